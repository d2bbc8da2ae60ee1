"""What `cm stage NAME` does: fill a stage's parameters by name, run it, show its progress, log it to MLflow."""

import importlib
import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flows
from flows.checkpoints.store import Checkpoint, drop_finished, hold_checkpoint, mark_finished, share_kernels
from flows.distributed.devices import SHARED
from flows.distributed.launch import join_stage, several_processes
from flows.errors import UserError
from flows.recipes.overrides import flatten
from flows.recipes.recipe import Recipe, active_name, load_active
from flows.settings import Settings
from flows.stage_runner.progress import Bar, StageMonitor
from flows.stage_runner.signals import StageSignals, end_with_caller
from flows.tracking.run_context import RunContext
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import Tracker, describe_run, files_below, shown_files
from flows.workspace.data_versions import fetch_versioned
from flows.workspace.dvc_files import Stage, dvc_md5, read_stages, stage_facts, stage_key, version
from flows.workspace.git import describe_code
from flows.workspace.locations import cache_of, shared_root

PREPARED, FACTS_FILE = "out/prepare", "dataset.json"
TRAINS = ("features", "teacher", "student")


def run_stage(name: str, root: Path) -> None:
    """Run one stage on params/active.yaml of the workspace `root`.

    Raises:
        UserError: no such stage, a missing input, a bad value, or code that is not this workspace's.
        SystemExit: 128 + signal, when SIGINT or SIGTERM asked the stage to end; a training has saved its state.
    """
    _refuse_other_code(root)
    stages = read_stages(root)
    if name not in stages:
        raise UserError(f"no stage {name!r}; there are {', '.join(stages)}")
    recipe, function = load_active(root), stage_function(name)
    inputs = {path: dvc_md5(root / path) for path in stages[name].deps if path.startswith("out/")}
    if "data" in stages[name].params:
        inputs |= _versioned_data(recipe, root)
    parameters = inspect.signature(function).parameters
    with StageSignals(deferred="state_dir" in parameters) as signals, ExitStack() as stack:
        if Settings.read().lifeline:
            end_with_caller()
        run = stack.enter_context(_tracked_run(stages[name], root, recipe, inputs))
        display = stack.enter_context(Bar(name, lines=True))
        checkpoint = None
        if "state_dir" in parameters:
            checkpoint = stack.enter_context(_checkpoint(stages[name], root, inputs, display.remark))
        monitor = StageMonitor(display, run, signals.received, checkpoint)
        given: dict[str, Any] = {"out_dir": _emptied(root / "out" / name), "monitor": monitor}
        if checkpoint:
            given["state_dir"] = checkpoint.folder
        section = getattr(recipe, name, None)
        together = {"facts": partial(facts, stages[name], root, inputs), "monitor": monitor}
        with signals.as_exit(), several_processes(name, section, root, given.get("state_dir"), **together):
            function(**fill_parameters(function, given, recipe, root))
        outs = {path: dvc_md5(root / path) for path in stages[name].outs}
        if checkpoint:
            mark_finished(checkpoint.folder, outs)
        _log_outputs(run, stages[name], root, outs)


def join(name: str, root: Path, say: Callable[[str], None]) -> None:
    """Share a stage that the main node of several runs, in a workspace of the same code, recipe and inputs.

    Raises:
        UserError: no such stage, a missing input, a bad value, or the main node computes something else.
        StageFailed: no main node was found, or another process was lost.
    """
    _refuse_other_code(root)
    stage = read_stages(root).get(name)
    if stage is None or name not in SHARED:
        raise UserError(f"{name}: several machines share {', '.join(SHARED)}, no other stage")
    recipe = load_active(root)
    join_stage(name, getattr(recipe, name), root, facts(stage, root, {}), say)


def facts(stage: Stage, root: Path, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return by name what must be the same on all nodes that share a stage."""
    cmd, deps, params, _ = stage_facts(root, stage, inputs)
    return flatten({"cmd": cmd, **deps, **params})


def _refuse_other_code(root: Path) -> None:
    """Refuse to fill this workspace's outputs with what another checkout's code computes."""
    imported = Path(flows.__file__).parent.resolve()
    if imported != (root / "flows").resolve():
        raise UserError(f"the code of {imported.parent} would run for the workspace {root}; set PYTHONPATH={root}")


def _versioned_data(recipe: Recipe, root: Path) -> dict[str, str]:
    """Have the data here that the recipe names and DVC versions; return their versions by path."""
    source = recipe.data.source
    return fetch_versioned(root, source.path, source.version) if hasattr(source, "path") else {}


def stage_function(name: str) -> Callable[..., None]:
    """Import the function of a stage."""
    return getattr(importlib.import_module(f"flows.stages.{name}"), name)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def fill_parameters(function: Callable, given: Mapping[str, Any], recipe: Recipe, root: Path) -> dict[str, Any]:
    """Return what each parameter of a stage gets: a service, a section, or another stage's artifact."""

    def argument(name: str) -> Any:
        if name in given:
            return given[name]
        return getattr(recipe, name) if name in type(recipe).model_fields else root / "out" / name.removesuffix("_dir")

    return {name: argument(name) for name in inspect.signature(function).parameters}


def _checkpoint(
    stage: Stage, root: Path, inputs: Mapping[str, str], say: Callable[[str], None]
) -> AbstractContextManager[Checkpoint]:
    """Return the checkpoint to hold while a stage trains, after removing those whose outputs are safely stored."""
    home = shared_root(root)
    drop_finished(home, cache_of(root).holds)
    share_kernels(home)
    waits = partial(say, "another process trains exactly this; waiting for it")
    return hold_checkpoint(home, stage.name, stage_key(root, stage, inputs), waits, say)


@contextmanager
def _tracked_run(stage: Stage, root: Path, recipe: Recipe, inputs: Mapping[str, str]) -> Iterator[StageRun]:
    """Open the stage's MLflow run, with all that is known before the stage starts."""
    belonging = RunContext.read()

    def tags() -> dict[str, str]:
        whence = belonging.tags or {**describe_code(root), "recipe": active_name(root)}
        return {**whence, **{f"dvc.dep.{Path(path).name}": md5 for path, md5 in inputs.items()}}

    def log_inputs(tracker: Tracker, run_id: str) -> None:
        tracker.log_params(run_id, flatten(recipe.model_dump(mode="json", include=set(stage.params))))
        if PREPARED in inputs:
            context = "training" if stage.name in TRAINS else "evaluation"
            tracker.log_dataset(run_id, root / PREPARED / FACTS_FILE, inputs[PREPARED], context)

    watch = stage.name in TRAINS
    with StageRun(shared_root(root), stage.name, belonging.parent_run_id, tags, watch_machine=watch) as run:
        run.submit(log_inputs)
        yield run


def _log_outputs(run: StageRun, stage: Stage, root: Path, outs: Mapping[str, str]) -> None:
    """Log what the stage made: its data version, the files worth a look, the data set."""
    folder = root / "out" / stage.name

    def log_outputs(tracker: Tracker, run_id: str) -> None:
        tracker.set_tags(run_id, {"dvc.out": version(outs), "mlflow.note.content": describe_run(run.tags, outs)})
        tracker.log_files(run_id, shown_files(files_below(folder, stage.name)))
        if PREPARED in outs:
            tracker.log_dataset(run_id, folder / FACTS_FILE, outs[PREPARED], "preparation")

    run.submit(log_outputs)
