"""The pipeline as a Prefect flow: each task updates one stage in the run's own clone.

A task ends as Cached if nothing had to run: Prefect's cache skips it without a shell, keyed by DVC's view of the stage
(command, dependencies, params), and only while DVC's cache holds the result; otherwise DVC consults its own cache.
"""

import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import Task, flow, runtime, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed

from flows.distributed.devices import SHARED, visible_devices
from flows.distributed.launch import processes_for
from flows.environment import THREADS, adopt, check_environment
from flows.errors import RunEnding, StageFailed, UserError
from flows.orchestration.artifacts import ProgressArtifact, links_to, show_data_report, show_result
from flows.orchestration.embedded import embedded_prefect, log_to_prefect
from flows.orchestration.gpu_slots import gpu_slot, takes_slot
from flows.orchestration.recovery import end_earlier_starts, end_with_worker
from flows.orchestration.results import read_json_alone, refused
from flows.orchestration.starter import starter
from flows.recipes.naming import called, title
from flows.recipes.recipe import EDITED, Recipe, flatten, validate, write_active
from flows.reports.lineage import Node, code_of, lineage, svg
from flows.reports.metrics_table import fids_in_words
from flows.settings import Settings
from flows.storage.allowed import restrict
from flows.storage.s3 import public_uri
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.registry import Rule, model_name
from flows.tracking.results import publish
from flows.tracking.run_report import earlier_students, keep_report
from flows.tracking.tracker import Tracker
from flows.workspace.clone import Workspace, clone, take_over
from flows.workspace.dvc_files import (
    Cache,
    Stage,
    all_locked_outs,
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
    try:
        recipe = _valid(parameters["recipe"], parameters["name"], Path(parameters.get("root", "")))
    except UserError:
        return str(parameters["name"])  # the flow refuses it
    return title(recipe, called(recipe, parameters["name"], workspace_root(Path(parameters.get("root", "")))))


# Checked by the flow, whose refusal is one line as everywhere; Prefect's would be three.
@flow(flow_run_name=run_title, validate_parameters=False)
def consistency(recipe: Recipe, name: str = EDITED, root: Path = Path()) -> dict[str, Any]:
    """Prepare images, train teacher, base and student, sample, edit, evaluate: whatever is not known already.

    Args:
        recipe: Every choice of the run.
        name: What the run is called, such as the name of its recipe file.
        root: The workspace, or a folder in it; by default the folder in which a worker runs the flow.
    """
    try:
        log_to_prefect()
        results = carry_out(_valid(recipe, name, Path(root)), name, Path(root))
    except UserError as error:  # its line is all there is to say: no traceback in the log
        return refused(error)  # type: ignore[return-value]  # Prefect raises the error from it
    return Completed(message=in_a_line(results), data=results)  # type: ignore[return-value]  # and returns the data


def _valid(recipe: Recipe | Mapping[str, Any], name: str, root: Path) -> Recipe:
    """Return the recipe, which a server hands over as plain values. Raises UserError.

    Validating may read what it names, an autoencoder's configuration: of the workspace and allowed places alone.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if runtime.deployment.id:
        restrict(workspace_root(root), Settings.read().allowed_sources)
    return validate(recipe, source=name)


def carry_out(recipe: Recipe, name: str, root: Path) -> dict[str, Any]:
    """Run the pipeline within the flow; return its results."""
    if runtime.deployment.id:
        end_with_worker()
    adopt()  # a worker of the user's own may have started this process
    check_environment()
    visible_devices()
    read_json_alone()
    root = workspace_root(root)
    name = called(recipe, name, root)
    Rule.in_force()  # this and the next line raise before anything is computed
    for stage in SHARED:
        processes_for(stage, getattr(recipe, stage))
    with clone(root, name) as workspace:
        write_active(recipe, workspace.root)
        tags = {**describe_code(root), "recipe": name, **_flow_tags(), **starter(root)}
        params = flatten(recipe.model_dump(mode="json"))
        tracker = Tracker(workspace.shared_root)
        end_earlier_starts(tracker)
        with PipelineRun(tracker, title(recipe, name), tags, params) as parent:
            stages = reproduce_all(workspace, parent)
            return finish(workspace, parent, stages, recipe, name, root)


def in_a_line(results: Mapping[str, Any]) -> str:
    """Return the results for the flow run's state, such as `FID 2.66 at 1 call, 2.46 at 2; 5 of 7 stages cached`."""
    cached = [stage["cached"] for stage in results["stages"].values()]
    return f"{fids_in_words(results['metrics'])}; {sum(cached)} of {len(cached)} stages cached"


def _flow_tags() -> dict[str, str]:
    """Return tags that name the flow run, and its page if the server outlives the run."""
    tags = {"prefect.flow_run": runtime.flow_run.name, "prefect.flow_run_id": runtime.flow_run.id}
    page = runtime.flow_run.ui_url if os.environ.get("PREFECT_API_URL") else None
    return {**tags, **({"prefect.url": page} if page else {})}


def reproduce_all(workspace: Workspace, parent: PipelineRun) -> dict[str, dict[str, Any]]:
    """Update all stages, concurrently where dvc.yaml allows; return the outcome of each."""
    stages, variables = read_stages(workspace.root), parent.variables()
    if runtime.deployment.id:
        variables["CM_FROM_SERVER"] = "1"  # the person who started the run there chose what its recipe reads
    futures: dict[str, PrefectFuture] = {}
    for stage in stages.values():
        inputs = {earlier.name: futures[earlier.name] for earlier in upstream(stage, stages)}
        named = reproduce.with_options(name=stage.name, task_run_name=stage.name)  # the name shown while the task waits
        shared = {THREADS: str(threads_for(stage, stages)), **variables}
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
    if given := os.environ.get(THREADS):
        return int(given.split(",")[0])  # a number for each level of nesting
    beside = [other for other in stages.values() if ancestors(other, stages) == ancestors(stage, stages)]
    return max(1, (os.cpu_count() or 1) // len(beside))


def key_unless_gone(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Return the stage's key; first invalidate a result under it whose objects DVC's cache has lost or damaged."""
    workspace, store = parameters["workspace"], context.result_store
    stage = read_stages(workspace.root)[parameters["stage"]]
    key = f"{stage.name}-{stage_key(workspace.root, stage, all_locked_outs(parameters['inputs'].values()))}"
    if store.exists(key):
        outs = locked_outs(store.read(key).result or {})  # none: invalidated, or the task was cancelled, or it failed
        if not outs or workspace.set_damaged_aside(outs) or not cache_of(workspace.root).holds(outs):
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
    declared = read_stages(workspace.root)[stage]
    slot = partial(gpu_slot, declared, workspace) if takes_slot(declared) else None
    try:
        result = workspace.reproduce(stage, slot=slot, variables=variables, on_progress=progress.show)
    except RunEnding:
        return Cancelled(message="stopped with its run")
    except UserError as error:
        return refused(error)
    files = stored_files({stage: locked_outs(result.entry)}, cache_of(workspace.root))
    if report := files.get("prepare/report.json"):
        show_data_report(report)
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
    workspace: Workspace, parent: PipelineRun, stages: dict[str, dict[str, Any]], recipe: Recipe, name: str, root: Path
) -> dict[str, Any]:
    """Show the results, new or cached, in MLflow and Prefect, and return them."""
    outs = {stage: locked_outs(result["entry"]) for stage, result in stages.items()}
    files = stored_files(outs, cache_of(workspace.root))
    others = earlier_students(parent.tracker, outs, files)  # before this run's own is registered
    metrics, figures, run_ids = publish(parent, recipe, outs, {**files, **workspace.edits()})
    picture = svg(lineage_of(workspace, parent, outs, recipe))
    report = keep_report(parent, recipe, root, workspace.shared_root, files, stages, run_ids, others, picture)
    dataset = recipe.data.source.dataset_name()
    links = links_to(parent.tracker.uri, parent.tracker.experiment_id, parent.run_id, model_name(dataset))
    results = {
        "title": runtime.flow_run.name,
        "name": name,
        "revision": workspace.revision,
        "metrics": metrics,
        "stages": {stage: {**result, "mlflow_run_id": run_ids.get(stage)} for stage, result in stages.items()},
        "mlflow": {
            "uri": public_uri(parent.tracker.uri),
            "experiment_id": parent.tracker.experiment_id,
            "run_id": parent.run_id,
        },
        "folder": str(workspace.folder),
        "report": report and str(report),
    }
    show_result(in_a_line(results), metrics, figures, links, picture)
    return results


def lineage_of(
    workspace: Workspace, parent: PipelineRun, outs: Mapping[str, Mapping[str, str]], recipe: Recipe
) -> list[Node]:
    """Return what the run's student is made of, with versions."""
    stages, dataset = read_stages(workspace.root), recipe.data.source.dataset_name()
    return lineage(
        {"data": dataset, "code": code_of(parent.tags), "recipe": parent.tags["recipe"]},
        {name: [one.name for one in upstream(stage, stages)] for name, stage in stages.items()},
        {stage: version(made) for stage, made in outs.items()},
        model=model_name(dataset),
        has_base=recipe.base is not None,
    )


def stored_files(outs: Mapping[str, Mapping[str, str]], cache: Cache) -> dict[str, Path]:
    """Return {stage/path: object in DVC's cache} of all outputs."""
    return {
        "/".join(filter(None, (path.removeprefix("out/"), below))): file
        for made in outs.values()
        for path, md5 in made.items()
        for below, file in cache.files(md5).items()
    }
