"""A pipeline run in MLflow for `dvc repro` and `dvc exp run`, which no flow accompanies."""

import os
from collections.abc import Mapping
from pathlib import Path

from flows.recipes.naming import active_name, title
from flows.recipes.recipe import Recipe, flatten
from flows.tracking.person import person
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.results import publish
from flows.tracking.tracker import PARENT_TAG, Tracker
from flows.workspace.dvc_files import files_in, locked_outs, read_lock, read_stages, version
from flows.workspace.git import describe_code
from flows.workspace.locations import shared_root

LAST = "evaluate"  # the stage with which a reproduction is complete
EXPERIMENT = "DVC_EXP_NAME"  # set by DVC for the stages of an experiment


def log_reproduction(root: Path, recipe: Recipe, outs: Mapping[str, str]) -> None:
    """Log a pipeline run above the stage runs of a reproduction, and register its student.

    `outs` are those of the stage `evaluate`, which DVC has not recorded yet. A stage that somebody ran by hand, without
    a record of the earlier ones in dvc.lock, is no reproduction.
    """
    made = {**{stage: locked_outs(entry) for stage, entry in read_lock(root).items()}, LAST: dict(outs)}
    if not set(read_stages(root)) <= set(made):
        return
    tracker, name = Tracker(shared_root(root)), active_name(root)
    found = [run_id for stage, paths in made.items() if (run_id := tracker.find_stage_run(stage, version(paths)))]
    runs = [run for run in map(tracker.client.get_run, found) if PARENT_TAG not in run.data.tags]
    experiment = os.environ.get(EXPERIMENT)
    called = " · ".join(filter(None, [experiment, title(recipe, name)]))
    tags = {**describe_code(root), **person(root), "recipe": name, **({"dvc.exp": experiment} if experiment else {})}
    params = flatten(recipe.model_dump(mode="json"))
    with PipelineRun(tracker, called, tags, params, since=min(run.info.start_time for run in runs)) as parent:
        for run in runs:
            tracker.set_tags(run.info.run_id, {PARENT_TAG: parent.run_id})
        folders = ((stage, root / "out" / stage) for stage in made)
        files = {f"{stage}/{file}": path for stage, folder in folders for file, path in files_in(folder).items()}
        publish(parent, recipe, made, files)
