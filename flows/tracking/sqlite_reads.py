"""MLflow's database in a workspace, read as SQLite: importing MLflow takes longer than a search of 10,000 runs."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from flows.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Run

NEWEST = """
    SELECT run_uuid AS run_id, runs.name AS run_name, status, start_time, end_time FROM runs
    JOIN experiments USING (experiment_id) JOIN tags USING (run_uuid)
    WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' AND tags.key = 'stage' AND tags.value = 'pipeline'
    ORDER BY start_time DESC, run_uuid LIMIT ?
"""
FACTS = {
    "tags": "SELECT key, value FROM tags WHERE run_uuid = ?",
    "params": "SELECT key, value FROM params WHERE run_uuid = ?",
    "metrics": "SELECT key, CASE WHEN is_nan THEN 'nan' ELSE value END FROM latest_metrics WHERE run_uuid = ?",
}
DATA_VERSIONS = """
    SELECT value FROM tags JOIN runs USING (run_uuid) WHERE key LIKE 'dvc.%'
    AND (lifecycle_stage = 'active' OR run_uuid IN (SELECT run_id FROM model_versions))
    UNION SELECT tag_value FROM logged_model_tags WHERE tag_key LIKE 'dvc.%'
"""


def database_file(shared_root: Path) -> Path | None:
    """Return the database in a workspace; None if there is none yet, or MLflow is elsewhere."""
    file = shared_root / "mlflow.db"
    return file if "MLFLOW_TRACKING_URI" not in os.environ and file.exists() else None


def newest_pipelines(file: Path, experiment: str, limit: int) -> "list[Run]":
    """Return the newest pipeline runs of an experiment, with the attributes of MLflow entities that `cm runs` shows."""
    with _reading(file) as database:
        infos = [SimpleNamespace(**row) for row in database.execute(NEWEST, (experiment, limit))]
        return [SimpleNamespace(info=info, data=_data(database, info.run_id)) for info in infos]  # type: ignore[misc]


def _data(database: sqlite3.Connection, run_id: str) -> SimpleNamespace:
    facts = {name: dict(map(tuple, database.execute(query, (run_id,)))) for name, query in FACTS.items()}
    return SimpleNamespace(**facts | {"metrics": {key: float(value) for key, value in facts["metrics"].items()}})


def data_versions(file: Path) -> set[str]:
    """Return every DVC hash on a run or model, deleted runs of registered models included."""
    with _reading(file) as database:
        return {md5 for row in database.execute(DATA_VERSIONS) for md5 in row[0].split()}


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    """Open a database read-only. Raises UserError if it cannot be read, or is of another version of MLflow."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=60)) as database:
            database.row_factory = sqlite3.Row
            yield database
    except sqlite3.Error as error:
        raise UserError(f"{file}: not readable as MLflow's database: {error}") from error
