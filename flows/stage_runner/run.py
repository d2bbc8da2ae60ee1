"""Run one stage, as `cm stage NAME` does: bind its parameters by name, show progress, log to MLflow.

If several processes share a stage, `cm stage` launches them (flows/distributed/launch.py), and rank 0 does all this.
"""

import importlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import flows
from flows.checkpoints.store import (
    Checkpoint,
    drop_finished,
    hold_checkpoint,
    mark_finished,
    share_kernels,
    states_folder,
)
from flows.data.sources import FileSource
from flows.distributed.devices import refuse_unusable_gpus
from flows.distributed.launch import hardware, launch_stage, processes_for, worker_group
from flows.errors import UserError
from flows.monitor import Monitor
from flows.recipes.naming import active_name
from flows.recipes.recipe import Recipe, flatten, load_active
from flows.settings import Settings
from flows.stage_runner.progress import Bar, StageMonitor
from flows.stage_runner.reproduction import LAST, log_reproduction
from flows.stage_runner.signals import StageSignals, end_with_caller, give_lifeline
from flows.stages.models import ORIGIN_FILE
from flows.stages.training import StageStopped
from flows.storage.allowed import restrict
from flows.storage.s3 import public_uri
from flows.tracking.description import describe_run
from flows.tracking.gpu_usage import GpuUsage
from flows.tracking.model_card import HARDWARE
from flows.tracking.person import person
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import MODEL_NAME, Tracker, shown_files
from flows.workspace.data_versions import fetch_versioned
from flows.workspace.dvc_files import GPU, Stage, dvc_md5, files_in, read_stages, stage_facts, training_key, version
from flows.workspace.git import describe_code
from flows.workspace.integrity import damaged_inputs, read_inputs, recorded_md5
from flows.workspace.locations import cache_of, shared_root
from flows.workspace.store_users import register_at_cache

PREPARED, FACTS_FILE = "out/prepare", "dataset.json"
TRAINS = ("features", "teacher", "base", "student")


def start_stage(name: str, root: Path) -> None:
    """Run one stage of the workspace `root` on params/active.yaml, here or in CM_DEVICES processes.

    Raises:
        UserError: no such stage, a missing input, a bad value, or code from another checkout.
        StageFailed: a process was lost.
        SystemExit: 128 + signal, after SIGINT or SIGTERM; a training has saved its state.
    """
    _, recipe, _ = _read_stage(name, root)
    count = processes_for(name, getattr(recipe, name, None))
    if count == 1:
        run_stage(name, root)
        return
    give_lifeline()
    launch_stage(name, count, sys.executable, "-m", "flows.stage_runner.worker", name)


def bring_inputs(name: str, root: Path) -> None:
    """Bring what a stage takes from outside the workspace, and read it for its hashes: dvc.yaml's `before`.

    Raises UserError as the stage does.
    """
    stage, recipe, _ = _read_stage(name, root)
    _fetch_data(stage, recipe, root)
    if "data" in stage.params:
        recipe.data.bring(Monitor())


def _fetch_data(stage: Stage, recipe: Recipe, root: Path) -> dict[str, str]:
    """Provide the data that a stage reads if DVC versions them; return {path: version}."""
    source = recipe.data.source
    if "data" in stage.params and isinstance(source, FileSource):
        return fetch_versioned(root, source.path, source.version)
    return {}


def run_stage(name: str, root: Path) -> None:
    """Run one stage in this process, alone or as rank 0; raises as `start_stage` does."""
    stage, recipe, function = _read_stage(name, root)
    md5 = recorded_md5(shared_root(root))
    inputs = read_inputs(root, stage, md5)
    # Under DVC only: it would record the hashes that it expects. Inputs brought by hand may be anything.
    if "DVC_STAGE" in os.environ and (damaged := damaged_inputs(root, inputs, md5)):
        raise UserError(f"{', '.join(damaged)}: not the bytes that DVC stored; remove it and start again")
    inputs |= _fetch_data(stage, recipe, root)
    out_dir, parameters = root / "out" / name, inspect.signature(function).parameters
    with _signals(function) as signals, ExitStack() as stack:
        run = stack.enter_context(_tracked_run(stage, root, recipe, inputs))
        display = stack.enter_context(Bar(name, lines=True))
        checkpoint = None
        if "state_dir" in parameters:
            checkpoint = stack.enter_context(_checkpoint(stage, root, inputs, display.remark))
        monitor = StageMonitor(display, run, signals.received, checkpoint)
        shutil.rmtree(out_dir, ignore_errors=True)
        out_dir.mkdir(parents=True)
        given: dict[str, Any] = {"out_dir": out_dir, "monitor": monitor}
        if checkpoint:
            given["state_dir"] = checkpoint.folder
        with (
            signals.as_exit(StageStopped),
            worker_group(name, getattr(recipe, name, None), partial(facts, stage, root, inputs)),
        ):
            function(**fill_parameters(function, given, recipe, root))
        outs = {path: dvc_md5(root / path, md5) for path in stage.outs}
        if checkpoint:
            mark_finished(checkpoint.folder, outs)
        _log_outputs(run, stage, root, recipe, inputs, outs)
    if name == LAST and not Settings.read().parent_run_id:
        log_reproduction(root, recipe, outs)


def share_stage(name: str, root: Path) -> None:
    """Run a rank other than 0: compute only, without state, outputs or tracking."""
    stage, recipe, function = _read_stage(name, root)
    share_kernels(shared_root(root))
    with _signals(function) as signals, TemporaryDirectory() as scratch:
        beside_main = os.environ["GROUP_RANK"] == "0"  # all ranks of a node write their images into one file
        monitor = Monitor()
        monitor.stop_requested = signals.received  # type: ignore[method-assign]  # all else of it does nothing
        given = {
            "out_dir": root / "out" / name if beside_main and name == "sample" else Path(scratch),
            "state_dir": states_folder(shared_root(root)) / name,  # stays empty; compiled kernels are kept beside it
            "monitor": monitor,
        }
        with (
            signals.as_exit(StageStopped),
            worker_group(name, getattr(recipe, name), partial(facts, stage, root, {}), signals.received),
        ):
            function(**fill_parameters(function, given, recipe, root))


def _read_stage(name: str, root: Path) -> tuple[Stage, Recipe, Callable[..., None]]:
    """Return a stage as dvc.yaml declares it, the recipe in force, and the stage's function.

    Refuse to write this workspace's outputs with code from another checkout.
    """
    imported = Path(flows.__file__).parent.resolve()
    if imported != (root / "flows").resolve():
        raise UserError(f"the code of {imported.parent} would run for the workspace {root}; set PYTHONPATH={root}")
    settings = Settings.read()
    if settings.from_server:
        restrict(root, settings.allowed_sources)
    stages = read_stages(root)
    if name not in stages:
        raise UserError(f"no stage {name!r}; there are {', '.join(stages)}")
    if stages[name].needs == GPU:
        refuse_unusable_gpus()
    return stages[name], load_active(root), getattr(importlib.import_module(f"flows.stages.{name}"), name)


@contextmanager
def _signals(function: Callable) -> Iterator[StageSignals]:
    """Handle signals, and the parent's end, while a stage runs."""
    with StageSignals(deferred="state_dir" in inspect.signature(function).parameters) as signals:
        if Settings.read().lifeline:
            end_with_caller(signals.received)
        yield signals


def facts(stage: Stage, root: Path, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return by name the facts on which all processes of a stage must agree."""
    cmd, deps, params, _ = stage_facts(root, stage, inputs)
    return flatten({"cmd": cmd, **deps, **params})


def fill_parameters(function: Callable, given: Mapping[str, Any], recipe: Recipe, root: Path) -> dict[str, Any]:
    """Return the argument of each parameter of a stage: a service, a section, or another stage's artifact."""

    def argument(name: str) -> Any:
        if name in given:
            return given[name]
        return getattr(recipe, name) if name in type(recipe).model_fields else root / "out" / name.removesuffix("_dir")

    return {name: argument(name) for name in inspect.signature(function).parameters}


def _checkpoint(
    stage: Stage, root: Path, inputs: Mapping[str, str], say: Callable[[str], None]
) -> AbstractContextManager[Checkpoint]:
    """Return the checkpoint to hold while a stage trains; first remove checkpoints whose outputs are stored."""
    shared = shared_root(root)
    drop_finished(shared, cache_of(root).holds)
    share_kernels(shared)
    waits = partial(say, "another process trains exactly this; waiting for it")
    return hold_checkpoint(shared, stage.name, training_key(root, stage, inputs), waits, say)


@contextmanager
def _tracked_run(stage: Stage, root: Path, recipe: Recipe, inputs: Mapping[str, str]) -> Iterator[StageRun]:
    """Open the stage's MLflow run with everything known before the stage starts."""
    settings = Settings.read()

    def tags() -> dict[str, str]:
        common = settings.run_tags or {**describe_code(root), **person(root), "recipe": active_name(root)}
        described = {**common, "mlflow.note.content": describe_run(common)}
        return {**described, "dvc.deps": " ".join(inputs.values())} if inputs else described

    def log_inputs(tracker: Tracker, run_id: str) -> None:
        tracker.log_params(run_id, flatten(recipe.model_dump(mode="json", include=set(stage.params))))
        if PREPARED in inputs:
            context = "training" if stage.name in TRAINS else "evaluation"
            tracker.log_dataset(run_id, root / PREPARED / FACTS_FILE, inputs[PREPARED], context)

    watch, usage, shared = stage.name in TRAINS, GpuUsage.of_stage(stage.needs == GPU), shared_root(root)
    if not settings.parent_run_id:
        register_at_cache(shared)  # what a pipeline run does for its stages
    with StageRun(shared, stage.name, settings.parent_run_id, tags, watch, usage) as run:
        run.submit(log_inputs)
        yield run


def _log_outputs(
    run: StageRun, stage: Stage, root: Path, recipe: Recipe, inputs: Mapping[str, str], outs: Mapping[str, str]
) -> None:
    """Log a stage's results: data version, lineage, files worth viewing, data set, model."""
    folder = root / "out" / stage.name

    def log_outputs(tracker: Tracker, run_id: str) -> None:
        tracker.set_tags(run_id, imported := _import_tags(folder, getattr(recipe, stage.name, None)))
        tracker.set_tags(run_id, {"dvc.out": version(outs), HARDWARE: hardware()})
        tracker.log_lineage(run_id, {"inputs": inputs, "outputs": outs})
        tracker.log_files(
            run_id, shown_files({f"{stage.name}/{name}": file for name, file in files_in(folder).items()})
        )
        if PREPARED in outs:
            tracker.log_dataset(run_id, folder / FACTS_FILE, outs[PREPARED], "preparation")
        if stage.name == MODEL_NAME:
            model_id = tracker.log_student(run_id, recipe, files_in(folder), version(outs))
            tracker.client.set_logged_model_tags(model_id, imported)

    run.submit(log_outputs)


def _import_tags(folder: Path, section: Any) -> dict[str, str]:
    """Return the tags that name the checkpoint of an imported model: address, SHA-256, format, licence."""
    if not getattr(section, "is_imported", False):
        return {}
    origin = {"weights": public_uri(section.weights), **json.loads((folder / ORIGIN_FILE).read_text())}
    return {f"import.{key}": value for key, value in origin.items()}
