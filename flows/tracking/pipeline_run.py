"""The MLflow run of a pipeline: the parent of its stages' runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.tracking.run_context import RunContext
from flows.tracking.tracker import (
    MODEL_FILES,
    MODEL_NAME,
    Tracker,
    code_tags,
    describe_run,
    error_tags,
    flat_numbers,
    status_after,
    student_numbers,
)
from flows.workspace.dvc_files import version

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe


class PipelineRun:
    """The parent run of a flow: its children are the runs of the stages that it executed.

    With `stage="sweep"` it is the parent of a sweep's pipeline runs, which find it in the environment.
    """

    def __init__(
        self,
        tracker: Tracker,
        name: str,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
        *,
        stage: str = "pipeline",
    ) -> None:
        self.tracker, self.tags, self._name, self._params = tracker, {**tags, "stage": stage}, name, params

    def __enter__(self) -> "PipelineRun":
        above = RunContext.read().parent_run_id
        parent = {"mlflow.parentRunId": above} if above else {}
        code = code_tags(self.tags, "consistency")
        tags = {**self.tags, **parent, **code, "mlflow.note.content": describe_run(self.tags, {})}
        run = self.tracker.client.create_run(self.tracker.experiment_id, run_name=self._name, tags=tags)
        self.run_id = run.info.run_id
        self.tracker.log_params(self.run_id, self._params)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.tracker.set_tags(self.run_id, error_tags(error))
        self._end_children()
        self.tracker.client.set_terminated(self.run_id, status_after(error))

    def _end_children(self) -> None:
        """Mark the runs of killed stages as ended."""
        query = f"tags.`mlflow.parentRunId` = '{self.run_id}' and attributes.status = 'RUNNING'"
        for child in self.tracker.client.search_runs([self.tracker.experiment_id], query):
            self.tracker.client.set_terminated(child.info.run_id, "KILLED")

    def context(self) -> RunContext:
        """Return the context of this flow's stage runs."""
        return RunContext(self.run_id, {key: value for key, value in self.tags.items() if key != "stage"})

    def log_stages(self, outs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Record each stage's outputs, {stage: {path: hash}}, and the run that computed them, in this flow or another.

        Return the run ids by stage; a stage computed without this MLflow has none.
        """
        versions = {stage: version(made) for stage, made in outs.items()}
        found = {stage: self.tracker.find_stage_run(stage, made) for stage, made in versions.items()}
        run_ids = {stage: run_id for stage, run_id in found.items() if run_id}
        tags = {f"dvc.out.{stage}": made for stage, made in versions.items()}
        tags |= {f"run_id.{stage}": run_id for stage, run_id in run_ids.items()}
        everything = {path: md5 for made in outs.values() for path, md5 in made.items()}
        self.tracker.set_tags(self.run_id, {**tags, "mlflow.note.content": describe_run(self.tags, everything)})
        return run_ids

    def log_results(self, metrics: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """Log the final numbers and the files worth viewing."""
        self.tracker.log_numbers(self.run_id, dict(flat_numbers(metrics)))
        self.tracker.log_files(self.run_id, files)

    def log_dataset(self, facts: Path, outs: Mapping[str, str]) -> None:
        """Log the data set of this dataset.json as an input."""
        self.tracker.log_dataset(self.run_id, facts, version(outs), "training")

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
        weights = {name: files[f"{MODEL_NAME}/{name}"] for name in MODEL_FILES}
        model_id = self.tracker.log_student(run_id or self.run_id, recipe, weights, version(outs))
        self.tracker.link_model(self.run_id, model_id)
        self.tracker.log_numbers(self.run_id, student_numbers(metrics), model_id=model_id)
        return model_id
