"""The MLflow run of a pipeline: the parent of its stages' runs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.reports.metrics_table import Metrics, by_row, fids_in_words, of_student, short_keys
from flows.settings import Settings, variable
from flows.tracking.curves import curves_of
from flows.tracking.description import describe_run, picture_of_run, results_in_markdown
from flows.tracking.run_queries import FEATURES, RESULT
from flows.tracking.tracker import COLOUR, MODEL_NAME, PARENT_TAG, Tracker
from flows.workspace.dvc_files import version

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe


@dataclass
class PipelineRun:
    """The parent run of a flow: its children are the runs of the stages that it executed.

    With `stage="sweep"` it is the parent of a sweep's pipeline runs, which find it in the environment.
    """

    tracker: Tracker
    name: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    stage: str = "pipeline"
    since: int | None = None  # ms, if it has begun before
    run_id: str = field(init=False)

    def __enter__(self) -> "PipelineRun":
        tags = {**self.tags, "stage": self.stage, "mlflow.note.content": describe_run(self.tags)}
        if self.stage == "pipeline":
            tags |= {COLOUR: self.tracker.free_colour(), RESULT: "none yet"}
        above = Settings.read().parent_run_id
        self.run_id = self.tracker.start_run(
            self.name, tags, command="consistency", parent_run_id=above, since=self.since
        )
        self.tracker.log_params(self.run_id, self.params)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.tracker.kill_runs(PARENT_TAG, self.run_id)
        self.tracker.book_usage(self.run_id)
        self.tracker.end_run(self.run_id, error)

    def variables(self) -> dict[str, str]:
        """Return the environment variables by which the runs below find their parent and its tags."""
        return {variable("parent_run_id"): self.run_id, variable("run_tags"): json.dumps(self.tags)}

    def log_stages(self, outs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Record each stage's outputs, {stage: {path: hash}}, and the run that computed them, in this flow or another.

        What has which hash is in the lineage; a tag holds the hashes alone, for `cm gc`.

        Return the run ids by stage; a stage computed without this MLflow has none.
        """
        versions = {stage: version(made) for stage, made in outs.items()}
        found = {stage: self.tracker.find_stage_run(stage, made) for stage, made in versions.items()}
        run_ids = {stage: run_id for stage, run_id in found.items() if run_id}
        self.tracker.set_tags(self.run_id, {"dvc.outs": " ".join(sorted(set(versions.values())))})
        self.tracker.log_lineage(self.run_id, {"outputs": outs, "versions": versions, "runs": run_ids})
        return run_ids

    def log_results(self, numbers: Mapping[str, float], files: Mapping[str, Path]) -> None:
        """Log the final numbers and the files worth viewing."""
        self.tracker.log_numbers(self.run_id, numbers)
        self.tracker.log_files(self.run_id, files)

    def log_evaluation(
        self, metrics: Metrics, protocol: Mapping[str, Any], files: Mapping[str, Path], shown: Mapping[str, Path]
    ) -> None:
        """Log metrics.json, the curves of the stages' outputs, `files`, and the files worth viewing, `shown`.

        The table with all rows, the bounds included, begins the run's description, which MLflow's pages fold; the
        student's images follow.
        """
        self.log_results(short_keys(metrics), shown)
        self.tracker.log_curves(self.run_id, self.tracker.missing(self.run_id, curves_of(files, metrics)))
        table = results_in_markdown(metrics, protocol.get("rows", {}))
        grids = [path for path in shown if path.startswith("sample/nfe_") and path.endswith(".png")]
        pictures = [picture_of_run(self.run_id, min(grids, key=lambda path: (len(path), path)))] if grids else []
        tags = {RESULT: fids_in_words(metrics), FEATURES: by_row(metrics)[0]}
        note = describe_run(self.tags, "\n\n".join([table, *pictures]))
        self.tracker.set_tags(self.run_id, {**tags, "mlflow.note.content": note})

    def log_student(
        self,
        recipe: "Recipe",
        files: Mapping[str, Path],
        outs: Mapping[str, str],
        metrics: Mapping[str, Any],
        run_id: str | None,
    ) -> str:
        """Log the student's weights, `files` {student/NAME: path}, if not yet logged, and its metrics; return its id.

        `run_id` is the run that trained it, if this MLflow has one.
        """
        own = f"{MODEL_NAME}/"
        weights = {name.removeprefix(own): path for name, path in files.items() if name.startswith(own)}
        model_id = self.tracker.log_student(run_id or self.run_id, recipe, weights, version(outs))
        self.tracker.link_model(self.run_id, model_id)
        self.tracker.log_numbers(self.run_id, of_student(metrics), model_id=model_id)
        return model_id
