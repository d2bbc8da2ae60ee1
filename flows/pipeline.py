"""The pipeline as a Prefect flow: each task updates one stage in the run's own clone.

A task ends as Cached if nothing had to run: Prefect's cache skips it without a shell, keyed by DVC's view of the stage
(command, dependencies, params), and only while DVC's cache holds the result; otherwise DVC consults its own cache.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import Task, flow, runtime, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.states import Completed

from flows.distributed.devices import SHARED
from flows.distributed.launch import processes_for
from flows.errors import StageFailed
from flows.orchestration.artifacts import ProgressArtifact, show_metrics, show_pictures, show_tracking
from flows.orchestration.embedded import embedded_prefect, log_to_prefect
from flows.orchestration.gpu_slots import gpu_slot
from flows.orchestration.recovery import end_earlier_starts
from flows.recipes.overrides import flatten
from flows.recipes.recipe import EDITED, Recipe, write_active
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.registry import Rule, register_student
from flows.tracking.tracker import MODEL_NAME, Tracker, shown_files
from flows.workspace.clone import Workspace, clone, take_over
from flows.workspace.dvc_files import (
    Cache,
    Stage,
    ancestors,
    locked_outs,
    read_stages,
    stage_key,
    update_lock,
    upstream,
    version,
)
from flows.workspace.git import describe_code
from flows.workspace.locations import cache_of, workspace_root

logger = logging.getLogger(__name__)
RETRY_DELAYS: list[float] = [2, 20]  # seconds; a training resumes from its last state
FIGURES_OF = ("prepare/", "sample/", "edit/", "evaluate/")  # stages whose figures go to the parent run


def run(recipe: Recipe, root: Path, *, name: str = EDITED, keep: bool = True) -> dict[str, Any]:
    """Run the pipeline on a recipe, with Prefect embedded or with the server of PREFECT_API_URL.

    With `keep`, the workspace `root` gets recipe and results, so that `dvc repro` has nothing to do. Returns the flow's
    results. Raises UserError for errors of the user, StageFailed for others.
    """
    with embedded_prefect(root):
        results = consistency(recipe, name, root)
    if keep:
        write_active(recipe, root, name)
        take_over(root, {stage: result["entry"] for stage, result in results["stages"].items()})
    return results


def run_title() -> str:
    """Return the name of the flow run: the recipe and the method's main choices."""
    parameters = runtime.flow_run.parameters
    return title(Recipe.model_validate(parameters["recipe"]), parameters["name"])


def title(recipe: Recipe, name: str) -> str:
    """Return a readable run name such as `digits-cd · cd heun N=18`."""
    method = recipe.student.method
    labels = {"solver": "{}", "num_scales": "N={}", "s0": "s0={}", "s1": "s1={}"}
    chosen = {field: getattr(method, field, None) for field in labels}
    words = [label.format(chosen[field]) for field, label in labels.items() if chosen[field] is not None]
    return " ".join(([f"{name} ·"] if name else []) + [method.kind, *words])


@flow(flow_run_name=run_title)
def consistency(recipe: Recipe, name: str = EDITED, root: Path = Path()) -> dict[str, Any]:
    """Prepare images, train teacher and student, sample, edit, evaluate: whatever of it is not known already.

    Args:
        recipe: Every choice of the run.
        name: What the run is called, such as the name of its recipe file.
        root: The workspace, or a folder in it; by default the folder in which a worker runs the flow.
    """
    log_to_prefect()
    root = workspace_root(root)
    Rule.in_force()  # this and the next line raise before anything is computed
    for stage in SHARED:
        processes_for(stage, getattr(recipe, stage))
    with clone(root, name) as workspace:
        write_active(recipe, workspace.root)
        tags = {**describe_code(root), "recipe": name, **_flow_tags()}
        params = flatten(recipe.model_dump(mode="json"))
        tracker = Tracker(workspace.shared_root)
        end_earlier_starts(tracker)
        with PipelineRun(tracker, title(recipe, name), tags, params) as parent:
            stages = reproduce_all(workspace, parent)
            return finish(workspace, parent, stages, recipe, name)


def _flow_tags() -> dict[str, str]:
    """Return tags that name the flow run, and its page if the server outlives the run."""
    tags = {"prefect.flow_run": runtime.flow_run.name, "prefect.flow_run_id": runtime.flow_run.id}
    page = runtime.flow_run.ui_url if os.environ.get("PREFECT_API_URL") else None
    return {**tags, **({"prefect.url": page} if page else {})}


def reproduce_all(workspace: Workspace, parent: PipelineRun) -> dict[str, dict[str, Any]]:
    """Update all stages, concurrently where dvc.yaml allows; return the outcome of each."""
    stages, variables = read_stages(workspace.root), parent.context().variables()
    futures: dict[str, PrefectFuture] = {}
    for stage in stages.values():
        inputs = {earlier.name: futures[earlier.name] for earlier in upstream(stage, stages)}
        named = reproduce.with_options(name=stage.name, task_run_name=stage.name)  # the name shown while the task waits
        shared = {"OMP_NUM_THREADS": str(threads_for(stage, stages)), **variables}
        futures[stage.name] = named.submit(stage.name, inputs, workspace, shared)
    try:
        results = {stage: _outcome(stage, future, workspace) for stage, future in futures.items()}
        workspace.push_again()
        return results
    finally:
        workspace.stop()  # stages must stop before the parent run ends


def threads_for(stage: Stage, stages: Mapping[str, Stage]) -> int:
    """Return a stage's number of CPU threads: all cores, shared with the stages that can start at the same time.

    More threads than cores slow each other down severalfold. OMP_NUM_THREADS in the environment takes precedence.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"])
    beside = [other for other in stages.values() if ancestors(other, stages) == ancestors(stage, stages)]
    return max(1, (os.cpu_count() or 1) // len(beside))


def key_unless_gone(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Return the stage's key; first invalidate a result under it whose objects DVC's cache has lost."""
    workspace, store = parameters["workspace"], context.result_store
    stage = read_stages(workspace.root)[parameters["stage"]]
    known = {path: md5 for entry in parameters["inputs"].values() for path, md5 in locked_outs(entry).items()}
    key = f"{stage.name}-{stage_key(workspace.root, stage, known)}"
    if store.exists(key) and not cache_of(workspace.root).holds(locked_outs(store.read(key).result)):
        now: Any = datetime.now(UTC)  # Prefect wants a subclass of its own
        store.write(None, key=key, expiration=now)
    return key


def is_worth_a_retry(_: Task, __: TaskRun, state: State) -> bool:
    """Whether retrying a failed task may help: not after a user error, nor when the run is ending."""
    return isinstance(state.result(raise_on_failure=False), StageFailed)


@task(
    cache_key_fn=key_unless_gone,
    result_serializer="json",
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=RETRY_DELAYS,
    retry_condition_fn=is_worth_a_retry,
)
def reproduce(stage: str, inputs: dict[str, Any], workspace: Workspace, variables: dict[str, str]) -> Any:
    """Update one stage and return its entry of dvc.lock; `inputs` are the entries of the stages it reads."""
    update_lock(workspace.root, inputs)  # DVC does not know the results of tasks that Prefect skipped
    progress = ProgressArtifact(stage)
    with gpu_slot(read_stages(workspace.root)[stage], workspace) as device:
        result = workspace.reproduce(stage, variables={**variables, **device}, on_progress=progress.show)
    if result.cached:
        return Completed(name="Cached", message="DVC's cache had it", data=result.entry)
    return result.entry


def _outcome(stage: str, future: PrefectFuture, workspace: Workspace) -> dict[str, Any]:
    """Wait for a stage; log and return its outcome. Raises the stage's exception."""
    entry, cached = future.result(), future.state.name == "Cached"
    seconds = workspace.seconds.get(stage, 0.0)
    came = "cached" if cached else f"done in {seconds:.1f} s"
    logger.info("%s: %s, data version %s", stage, came, version(locked_outs(entry)))
    return {"cached": cached, "seconds": seconds, "entry": entry}


def finish(
    workspace: Workspace, parent: PipelineRun, stages: dict[str, dict[str, Any]], recipe: Recipe, name: str
) -> dict[str, Any]:
    """Show the results, new or cached, in MLflow and Prefect, and return them."""
    outs = {stage: locked_outs(result["entry"]) for stage, result in stages.items()}
    files = stored_files(outs, cache_of(workspace.root))
    metrics = json.loads(files["evaluate/metrics.json"].read_text())
    figures = {path: file for path, file in shown_files(files).items() if path.startswith(FIGURES_OF)}
    run_ids = parent.log_stages(outs)
    parent.log_results(metrics, {**figures, **workspace.edits()})
    if "prepare/dataset.json" in files:
        parent.log_dataset(files["prepare/dataset.json"], outs["prepare"])
    if MODEL_NAME in outs:
        publish_student(parent, recipe, outs, files, metrics, run_ids.get(MODEL_NAME))
    show_metrics(metrics)
    show_pictures(figures)
    show_tracking(parent.tracker.uri, parent.tracker.experiment_id, parent.run_id)
    return {
        "title": runtime.flow_run.name,
        "name": name,
        "revision": workspace.revision,
        "metrics": metrics,
        "stages": {stage: {**result, "mlflow_run_id": run_ids.get(stage)} for stage, result in stages.items()},
        "mlflow": {"uri": parent.tracker.uri, "experiment_id": parent.tracker.experiment_id, "run_id": parent.run_id},
        "folder": str(workspace.folder),
    }


def publish_student(
    parent: PipelineRun,
    recipe: Recipe,
    outs: Mapping[str, Mapping[str, str]],
    files: Mapping[str, Path],
    metrics: Mapping[str, Any],
    trained_by: str | None,
) -> None:
    """Log the student and register it with its metrics; log its registered name."""
    model_id = parent.log_student(recipe, files, outs[MODEL_NAME], metrics, trained_by)
    name, registered = register_student(
        parent.tracker,
        model_id,
        dataset=json.loads(files["prepare/dataset.json"].read_text())["name"],
        data_version=version(outs["prepare"]),
        protocol=json.loads(files["evaluate/protocol.json"].read_text()),
        metrics=metrics,
        tags={"recipe": parent.tags["recipe"], "method": recipe.student.method.kind, "run_id": parent.run_id},
    )
    logger.info("student: %s version %s in MLflow's registry", name, registered.number)


def stored_files(outs: Mapping[str, Mapping[str, str]], cache: Cache) -> dict[str, Path]:
    """Return {stage/path: object in DVC's cache} of all outputs."""
    return {
        "/".join(filter(None, (path.removeprefix("out/"), below))): file
        for made in outs.values()
        for path, md5 in made.items()
        for below, file in cache.files(md5).items()
    }
