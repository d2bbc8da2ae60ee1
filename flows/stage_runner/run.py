"""Run one stage, as `cm stage NAME` does: bind its parameters by name, show progress, log to MLflow.

If several processes share a stage, `cm stage` launches them (flows/distributed/launch.py), and rank 0 does all this.
"""

import importlib
import inspect
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
from flows.distributed.launch import launch_stage, processes_for, worker_group
from flows.errors import UserError
from flows.monitor import Monitor
from flows.recipes.overrides import flatten
from flows.recipes.recipe import Recipe, active_name, load_active
from flows.settings import Settings
from flows.stage_runner.progress import Bar, StageMonitor
from flows.stage_runner.signals import StageSignals, end_with_caller, give_lifeline
from flows.stages.training import StageStopped
from flows.tracking.run_context import RunContext
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import MODEL_FILES, MODEL_NAME, Tracker, describe_run, files_below, shown_files
from flows.workspace.data_versions import fetch_versioned
from flows.workspace.dvc_files import Stage, dvc_md5, read_stages, stage_facts, stage_key, version
from flows.workspace.git import describe_code
from flows.workspace.locations import cache_of, shared_root

PREPARED, FACTS_FILE = "out/prepare", "dataset.json"
TRAINS = ("features", "teacher", "student")


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


def run_stage(name: str, root: Path) -> None:
    """Run one stage in this process, alone or as rank 0; raises as `start_stage` does."""
    stage, recipe, function = _read_stage(name, root)
    inputs = {path: dvc_md5(root / path) for path in stage.deps if path.startswith("out/")}
    source = recipe.data.source
    if "data" in stage.params and isinstance(source, FileSource):  # fetch data that DVC versions
        inputs |= fetch_versioned(root, source.path, source.version)
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
        outs = {path: dvc_md5(root / path) for path in stage.outs}
        if checkpoint:
            mark_finished(checkpoint.folder, outs)
        _log_outputs(run, stage, root, recipe, outs)


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
    """Return a stage as dvc.yaml declares it, the recipe in force, and the stage's function."""
    _refuse_other_code(root)
    stages = read_stages(root)
    if name not in stages:
        raise UserError(f"no stage {name!r}; there are {', '.join(stages)}")
    return stages[name], load_active(root), getattr(importlib.import_module(f"flows.stages.{name}"), name)


@contextmanager
def _signals(function: Callable) -> Iterator[StageSignals]:
    """Handle signals, and the parent's end, while a stage runs."""
    with StageSignals(deferred="state_dir" in inspect.signature(function).parameters) as signals:
        if Settings.read().lifeline:
            end_with_caller()
        yield signals


def facts(stage: Stage, root: Path, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return by name the facts on which all processes of a stage must agree."""
    cmd, deps, params, _ = stage_facts(root, stage, inputs)
    return flatten({"cmd": cmd, **deps, **params})


def _refuse_other_code(root: Path) -> None:
    """Refuse to write this workspace's outputs with code from another checkout."""
    imported = Path(flows.__file__).parent.resolve()
    if imported != (root / "flows").resolve():
        raise UserError(f"the code of {imported.parent} would run for the workspace {root}; set PYTHONPATH={root}")


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
    return hold_checkpoint(shared, stage.name, stage_key(root, stage, inputs), waits, say)


@contextmanager
def _tracked_run(stage: Stage, root: Path, recipe: Recipe, inputs: Mapping[str, str]) -> Iterator[StageRun]:
    """Open the stage's MLflow run with everything known before the stage starts."""
    run_context = RunContext.read()

    def tags() -> dict[str, str]:
        shared = run_context.tags or {**describe_code(root), "recipe": active_name(root)}
        return {**shared, **{f"dvc.dep.{Path(path).name}": md5 for path, md5 in inputs.items()}}

    def log_inputs(tracker: Tracker, run_id: str) -> None:
        tracker.log_params(run_id, flatten(recipe.model_dump(mode="json", include=set(stage.params))))
        if PREPARED in inputs:
            context = "training" if stage.name in TRAINS else "evaluation"
            tracker.log_dataset(run_id, root / PREPARED / FACTS_FILE, inputs[PREPARED], context)

    watch = stage.name in TRAINS
    with StageRun(shared_root(root), stage.name, run_context.parent_run_id, tags, watch_machine=watch) as run:
        run.submit(log_inputs)
        yield run


def _log_outputs(run: StageRun, stage: Stage, root: Path, recipe: Recipe, outs: Mapping[str, str]) -> None:
    """Log a stage's results: data version, files worth viewing, data set, model."""
    folder = root / "out" / stage.name

    def log_outputs(tracker: Tracker, run_id: str) -> None:
        tracker.set_tags(run_id, {"dvc.out": version(outs), "mlflow.note.content": describe_run(run.tags, outs)})
        tracker.log_files(run_id, shown_files(files_below(folder, stage.name)))
        if PREPARED in outs:
            tracker.log_dataset(run_id, folder / FACTS_FILE, outs[PREPARED], "preparation")
        if stage.name == MODEL_NAME:
            tracker.log_student(run_id, recipe, {name: folder / name for name in MODEL_FILES}, version(outs))

    run.submit(log_outputs)
