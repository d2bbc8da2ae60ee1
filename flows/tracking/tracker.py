"""MLflow: one run per executed stage, a parent per pipeline run, the student as a model.

The store does not depend on the working directory: MLFLOW_TRACKING_URI, or mlflow.db and mlruns/ at the workspace root,
where a plain `mlflow ui` shows it. The DVC hash of a stage's outputs identifies its run.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flows.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flows.recipes.recipe import Recipe

EXPERIMENT = "consistency-models"
MODEL_NAME, MODEL_FILES = "student", ("ema.safetensors", "model.json")
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for --json
}
MOST_PARAMS = 100  # per request, MLflow's limit
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
        given = os.environ.get("MLFLOW_TRACKING_URI")
        self.uri = given or f"sqlite:///{shared_root / 'mlflow.db'}"
        mlflow.set_tracking_uri(self.uri)
        if given is None:  # MLflow writes its own choice into the environment, where only the user's belongs
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        self.client: MlflowClient = mlflow.MlflowClient(self.uri)
        self.experiment_id = self._open_experiment(None if given else (shared_root / "mlruns").as_uri())

    def _open_experiment(self, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        try:
            found = self.client.get_experiment_by_name(name)
            return found.experiment_id if found else self.client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":  # another process was faster
                return self.client.get_experiment_by_name(name).experiment_id  # type: ignore[union-attr]  # it exists
            raise UserError(f"MLflow at {self.uri}: {' '.join(str(error).split())[:300]}") from error

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
        return {value for one in tags for key, value in one.items() if key.startswith("dvc.")}

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

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log flattened params; non-strings as JSON."""
        from mlflow.entities import Param

        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in params.items()}
        entities = [Param(key, text) for key, text in texts.items()]
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
        """Copy files to a run's artifacts, keyed by artifact path."""
        with _folder_of(files) as folder:
            self.client.log_artifacts(run_id, folder)

    def student_model(
        self,
        run_id: str,
        files: Mapping[str, Path],
        data_version: str,
        params: Mapping[str, Any],
        mid_sigmas: Sequence[Sequence[float]] = (),
    ) -> str:
        """Return the id of the logged model with this data version; log `files` {name: path} if there is none.

        `mid_sigmas` are the sampling levels of its recipe.
        """
        from flows.inference.package import packaged_student

        query = f"name = '{MODEL_NAME}' and tags.`dvc.out` = '{data_version}'"
        for known in self.client.search_logged_models([self.experiment_id], query):
            if known.status == "READY":  # cannot be filtered by query: the store keeps a number
                return known.model_id
        model = self.client.create_logged_model(
            self.experiment_id,
            MODEL_NAME,
            source_run_id=run_id,
            tags={"dvc.out": data_version},
            params={key: str(value) for key, value in params.items()},
        )
        weights = {name: files[name] for name in MODEL_FILES}
        with packaged_student(weights, mid_sigmas, model.model_id) as folder:
            self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        return model.model_id

    def log_student(self, run_id: str, recipe: "Recipe", weights: Mapping[str, Path], data_version: str) -> str:
        """Log a student's weights, {name: path}, unless they are logged, and list the model among a run's outputs."""
        from flows.recipes.overrides import flatten

        method = flatten({"method": recipe.student.method.model_dump(mode="json")})
        model_id = self.student_model(run_id, weights, data_version, method, recipe.sample.mid_sigmas)
        self.link_model(run_id, model_id)
        return model_id

    def link_model(self, run_id: str, model_id: str) -> None:
        """List a model among a run's outputs, once."""
        from mlflow.entities import LoggedModelOutput

        outputs = self.client.get_run(run_id).outputs
        if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else ())]:
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])


def all_pages(search: Callable[..., Any], *arguments: Any, **query: Any) -> Iterator[Any]:
    """Yield the items of all pages of an MLflow search."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **query)
        yield from page
        token = page.token
        if not token:
            return


@contextmanager
def _folder_of(files: Mapping[str, Path]) -> Iterator[str]:
    """Yield a folder with the files under their names: objects of a cache are named by hash."""
    with TemporaryDirectory() as folder:
        for name, path in files.items():
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).symlink_to(path.resolve())
        yield folder


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


def files_below(folder: Path, prefix: str) -> dict[str, Path]:
    """Return {prefix/path below the folder: file}, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}/{path.relative_to(folder).as_posix()}": path for path in files}


def flat_numbers(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings under keys joined by `/`, as MLflow groups charts."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def student_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of the student's own images, {fid_classifier/nfe_1: value}."""
    return {key: value for key, value in flat_numbers(metrics) if "/nfe_" in key}


def status_after(error: BaseException | None) -> str:
    """Return MLflow's status of a run that ended with this error or none."""
    if error is None:
        return "FINISHED"
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def error_tags(error: BaseException | None) -> dict[str, str]:
    """Return the tag that holds a run's error."""
    return {"error": f"{type(error).__name__}: {error}"[:500]} if error else {}


def code_tags(tags: Mapping[str, str], command: str) -> dict[str, str]:
    """Return the tags of source and commit; MLflow by itself would name the installed script."""
    commit = {"mlflow.source.git.commit": tags["git.revision"]} if "git.revision" in tags else {}
    return {"mlflow.source.name": command, **commit}


def describe_run(tags: Mapping[str, str], outs: Mapping[str, str]) -> str:
    """Return a run's description in markdown, with links to its context and its results."""
    lines = [f"- recipe: `{tags['recipe']}`"]
    if "git.revision" in tags:
        edits = ", with uncommitted edits" if "git.edits" in tags else ""
        lines.append("- code: " + _linked(tags["git.revision"][:12], tags.get("git.url")) + edits)
    if "prefect.flow_run" in tags:
        lines.append("- Prefect: " + _linked(tags["prefect.flow_run"], tags.get("prefect.url")))
    lines += [f"- `{path}`: `{md5}`" for path, md5 in outs.items()]
    return "\n".join(lines)


def _linked(text: str, url: str | None) -> str:
    return f"[{text}]({url})" if url else f"`{text}`"
