"""MLflow: one run per executed stage, a parent per pipeline run, the student as a model.

The store does not depend on the working directory: MLFLOW_TRACKING_URI, or mlflow.db and mlruns/ at the workspace root,
where `make ui` shows it. The DVC hash of a stage's outputs identifies its run.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flows.errors import UserError
from flows.storage.s3 import addressing_style, public_text
from flows.tracking.database import check_database, make_database
from flows.tracking.gpu_usage import summed
from flows.tracking.run_queries import PIPELINES, RESULT

if TYPE_CHECKING:
    from flows.recipes.recipe import Recipe

EXPERIMENT = "consistency-models"
PARENT_TAG = "mlflow.parentRunId"
MODEL_NAME, MODEL_FILES = "student", ("ema.safetensors", "model.json")
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for --json
}
MOST_PARAMS, MOST_METRICS = 100, 1000  # per request, MLflow's limits
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's pages open their view for language models
COLOUR = "mlflow.runColor"  # of a run in MLflow's charts; by itself MLflow draws it at random, from similar ones
COLOURS = (
    "#4269d0",
    "#e8710a",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#17a2b8",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
)  # as many as MLflow's charts show at first
FIRST_TAGS = (RESULT, "recipe", "stage")  # MLflow's pages keep the order
LINEAGE = "lineage.json"  # the artifact with data versions by path, which people rarely read
SMALL = 5 * 2**20  # bytes; larger files stay in DVC and are not copied to MLflow
SHOWN = {".png", ".json", ".jsonl", ".csv", ".html", ".patch"}


class Tracker:
    """A connection to MLflow and the experiment that holds all runs."""

    def __init__(self, shared_root: Path) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        import mlflow

        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        if style := addressing_style():  # which its S3 client would overrule
            os.environ.setdefault("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", style)
        given = os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = given or f"sqlite:///{shared_root / 'mlflow.db'}"
        mlflow.set_tracking_uri(self.uri)
        if given is None:  # MLflow writes its own choice into the environment, where only the user's belongs
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        check_database(self.uri)
        make_database(self.uri)
        artifacts = None if given else (shared_root / "mlruns").as_uri()
        if artifacts:  # of MLflow's experiment "Default", whose folder it writes into SQL as it is: no quotes in a URI
            os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifacts
        self.experiment_id = self._open_experiment(artifacts)

    def _open_experiment(self, artifacts: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        name = experiment_name()
        try:
            self.client: MlflowClient = MlflowClient(self.uri)
            found = self.client.get_experiment_by_name(name)
            if found is None:
                return self.client.create_experiment(name, artifact_location=artifacts, tags=KIND)
            with suppress(MlflowException):  # a user who may only read need not
                for key in KIND.keys() - found.tags.keys():  # one that an earlier version created
                    self.client.set_experiment_tag(found.experiment_id, key, KIND[key])
            return found.experiment_id
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":  # another process was faster
                return self.client.get_experiment_by_name(name).experiment_id  # type: ignore[union-attr]  # it exists
            raise UserError(public_text(f"MLflow at {self.uri}: {' '.join(str(error).split())[:300]}")) from error

    def start_run(
        self, name: str, tags: Mapping[str, str], *, command: str, parent_run_id: str | None, since: int | None = None
    ) -> str:
        """Open a run below its parent, if there is one, and return its id; `since` is its start, ms, if not now."""
        own = {"mlflow.source.name": command}  # MLflow by itself would name the installed script
        if "git.revision" in tags:
            own["mlflow.source.git.commit"] = tags["git.revision"]
        if parent_run_id:
            own[PARENT_TAG] = parent_run_id
        everything = {**{key: tags[key] for key in FIRST_TAGS if key in tags}, **tags, **own}
        return self.client.create_run(self.experiment_id, since, everything, run_name=name).info.run_id

    def end_run(self, run_id: str, error: BaseException | None) -> None:
        """Close a run that ended with this error or none."""
        if error:
            self.set_tags(run_id, {"error": public_text(f"{type(error).__name__}: {error}")[:500]})
        status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        self.client.set_terminated(run_id, status)

    def kill_runs(self, tag: str, value: str) -> None:
        """Mark the running runs with this tag, whose processes are gone, as killed."""
        query = f"tags.`{tag}` = '{value}' and attributes.status = 'RUNNING'"
        for lost in self.client.search_runs([self.experiment_id], query):
            self.book_usage(lost.info.run_id)
            self.client.set_terminated(lost.info.run_id, "KILLED")

    def book_usage(self, run_id: str) -> dict[str, float]:
        """Log to a run the sums of GPU-hours and energy of the runs below it, if there are some; return them."""
        query = f"tags.`mlflow.parentRunId` = '{run_id}'"
        below = all_pages(self.client.search_runs, [self.experiment_id], query)
        if usage := summed([run.data.metrics for run in below]):
            self.log_numbers(run_id, usage)
        return usage

    def find_stage_run(self, stage: str, data_version: str) -> str | None:
        """Return the id of the newest run of `stage` that produced this data version."""
        query = f"tags.stage = '{stage}' and tags.`dvc.out` = '{data_version}' and attributes.status = 'FINISHED'"
        runs = self.client.search_runs([self.experiment_id], query, max_results=1)
        return runs[0].info.run_id if runs else None

    def data_versions(self) -> set[str]:
        """Return every DVC hash on a run or model, registered ones included, of any experiment."""
        experiments = [one.experiment_id for one in self.client.search_experiments()]
        runs = list(all_pages(self.client.search_runs, experiments))
        models = list(all_pages(self.client.search_logged_models, experiments))
        registered = all_pages(self.client.search_model_versions)
        runs += [self.client.get_run(one.run_id) for one in registered if one.run_id]  # including deleted runs
        tags = [run.data.tags for run in runs] + [model.tags for model in models]
        return {md5 for one in tags for key, value in one.items() if key.startswith("dvc.") for md5 in value.split()}

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_numbers(
        self, run_id: str, values: Mapping[str, float], *, step: int = 0, model_id: str | None = None
    ) -> None:
        """Log numbers to a run, and to a model if one is given."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step, model_id=model_id) for key, value in values.items()]
        self.client.log_batch(run_id, metrics)

    def log_curves(self, run_id: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Log curves, {key: [(step, value)]}, MOST_METRICS points a request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(key, value, now, step) for key, curve in curves.items() for step, value in curve]
        for start in range(0, len(points), MOST_METRICS):
            self.client.log_batch(run_id, points[start : start + MOST_METRICS])

    def missing(
        self, run_id: str, curves: Mapping[str, Sequence[tuple[int, float]]]
    ) -> dict[str, list[tuple[int, float]]]:
        """Return the points of curves at steps that the run does not have."""
        known = {key: {one.step for one in self.client.get_metric_history(run_id, key)} for key in curves}
        return {
            key: [(step, value) for step, value in curve if step not in known[key]] for key, curve in curves.items()
        }

    def free_colour(self) -> str:
        """Return the colour for a new pipeline run: the one that the newest of them have not had for longest."""
        newest = self.client.search_runs([self.experiment_id], PIPELINES, max_results=len(COLOURS))
        used = [run.data.tags.get(COLOUR) for run in newest]
        return max(COLOURS, key=lambda colour: used.index(colour) if colour in used else len(used))

    def log_lineage(self, run_id: str, lineage: Mapping[str, Any]) -> None:
        """Log what a run was made from and has made, by data version, as LINEAGE."""
        self.client.log_text(run_id, json.dumps(lineage, indent=2) + "\n", LINEAGE)

    def read_lineage(self, run_id: str) -> dict[str, Any]:
        """Return what `log_lineage` has logged of a run; empty if it did not come so far."""
        if LINEAGE not in {file.path for file in self.client.list_artifacts(run_id)}:
            return {}
        with TemporaryDirectory() as scratch:
            found: dict[str, Any] = json.loads(
                Path(self.client.download_artifacts(run_id, LINEAGE, scratch)).read_text()
            )
        return found

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log flattened params; non-strings as JSON, addresses without what may be secret."""
        from mlflow.entities import Param

        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in params.items()}
        entities = [Param(key, public_text(text)) for key, text in texts.items()]
        for start in range(0, len(entities), MOST_PARAMS):
            self.client.log_batch(run_id, params=entities[start : start + MOST_PARAMS])

    def log_dataset(self, run_id: str, facts_file: Path, md5: str, context: str) -> None:
        """Log the data set of dataset.json as an input, with DVC's hash as the digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        facts = json.loads(facts_file.read_text())
        source_type, source = _dataset_source(facts.get("source", "unknown"))
        profile = {key: facts[key] for key in ("counts", "image_shape", "num_classes", "licence") if key in facts}
        dataset = Dataset(facts["name"], md5, source_type, json.dumps(source), profile=json.dumps(profile))
        tags = [InputTag("mlflow.data.context", context), InputTag("dvc.md5", md5)]
        self.client.log_inputs(run_id, [DatasetInput(dataset, tags)])

    def log_files(self, run_id: str, files: Mapping[str, Path]) -> None:
        """Copy files to a run's artifacts, keyed by artifact path; objects of a cache are named by hash."""
        with TemporaryDirectory() as folder:
            for name, path in files.items():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).symlink_to(path.resolve())
            self.client.log_artifacts(run_id, folder)

    def log_student(self, run_id: str, recipe: "Recipe", files: Mapping[str, Path], data_version: str) -> str:
        """Log a student, `files` {name: path}, unless it is logged; list it among the run's outputs; return its id."""
        model_id = self.find_student(data_version) or self._add_student(run_id, recipe, files, data_version)
        self.link_model(run_id, model_id)
        return model_id

    def find_student(self, data_version: str) -> str | None:
        """Return the id of the logged student with this data version."""
        query = f"tags.`dvc.out` = '{data_version}'"
        known = self.client.search_logged_models([self.experiment_id], query)
        # Its status is no part of the query: the store keeps a number.
        return next((model.model_id for model in known if model.status == "READY"), None)

    def _add_student(self, run_id: str, recipe: "Recipe", files: Mapping[str, Path], data_version: str) -> str:
        from cm_core.latents import DECODER_FILE
        from flows.inference.package import packaged_student
        from flows.recipes.recipe import flatten

        method = flatten({"method": recipe.student.method.model_dump(mode="json")})
        params, tags = {key: str(value) for key, value in method.items()}, {"dvc.out": data_version}
        recipe_name = self.client.get_run(run_id).data.tags.get("recipe", "")
        name = model_label(stage_title(recipe_name, MODEL_NAME))
        model = self.client.create_logged_model(
            self.experiment_id, name, source_run_id=run_id, tags=tags, params=params
        )
        weights = {name: files[name] for name in (*MODEL_FILES, *({DECODER_FILE} & files.keys()))}
        with packaged_student(weights, recipe.sample.mid_sigmas, model.model_id) as folder:
            self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        return model.model_id

    def link_model(self, run_id: str, model_id: str) -> None:
        """List a model among a run's outputs, once."""
        from mlflow.entities import LoggedModelOutput

        outputs = self.client.get_run(run_id).outputs
        if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else ())]:
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def experiment_name() -> str:
    """Return the name of the experiment that holds all runs."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)


def all_pages(search: Callable[..., Any], *arguments: Any, **query: Any) -> Iterator[Any]:
    """Yield the items of all pages of an MLflow search."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **query)
        yield from page
        token = page.token
        if not token:
            return


def fetch_student(model_uri: str, shared_root: Path) -> Path:
    """Download a logged student (models:/ID, models:/NAME@ALIAS); return its folder for `load_model`."""
    from flows.inference.package import weights_of

    Tracker(shared_root)
    import mlflow

    return weights_of(Path(mlflow.artifacts.download_artifacts(model_uri)))


def _dataset_source(source: str) -> tuple[str, dict[str, Any]]:
    """Return MLflow's (type, fields) of a data set's source: the first of several addresses."""
    first = source.split(", ")[0]
    if first.startswith(("http://", "https://")):
        return "http", {"url": first}
    if first.startswith("s3://"):
        return "s3", {"uri": first}
    if "/" in first:
        return "local", {"uri": first}
    return "code", {"tags": {"mlflow.source.name": first}}


def shown_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return those of {name: path} worth viewing in MLflow: small pictures, tables and reports."""
    return {name: path for name, path in files.items() if Path(name).suffix in SHOWN and path.stat().st_size <= SMALL}


def stage_title(recipe: str, stage: str) -> str:
    """Return the name of a stage's run, such as `digits-cd seed=3 · student`."""
    return " · ".join(filter(None, [recipe, stage]))


def model_label(title: str) -> str:
    """Return a title as a name that MLflow accepts for a logged model, decimal points raised: `mu0=0·9`."""
    return re.sub(r"[/:%\"']+", "-", title.replace(".", "·"))
