"""Prefect artifacts of a flow run: live progress, metrics, pictures, a link to MLflow."""

import base64
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

logger = logging.getLogger(__name__)
LARGEST_PICTURE = 2**20  # bytes; pictures are stored in Prefect's database


class ProgressArtifact:
    """A stage's progress artifact, created at its first progress report."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._id: Any = None

    def show(self, progress: Mapping[str, Any]) -> None:
        """Show {done, total, unit}; an unreachable server does not stop a training."""
        try:
            self._show(progress)
        except httpx.HTTPError as error:
            logger.warning("%s: progress is not shown, the stage continues: %s", self._stage, error)

    def _show(self, progress: Mapping[str, Any]) -> None:
        percent = 100 * progress["done"] / max(progress["total"], 1)
        text = f"{self._stage}: {progress['done']:,} of {progress['total']:,} {progress['unit']}"
        if self._id is None:
            self._id = create_progress_artifact(percent, key=_key(f"progress-{self._stage}"), description=text)
        else:
            update_progress_artifact(self._id, percent, description=text)


def show_metrics(metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Show {metric: {row: value}} as a table, one line per row of images."""
    rows = dict.fromkeys(row for values in metrics.values() for row in values)
    table = [
        {"images": row, **{metric: values[row] for metric, values in metrics.items() if row in values}} for row in rows
    ]
    create_table_artifact(table, key="metrics", description="Metrics of every row of images")


def show_pictures(files: Mapping[str, Path]) -> None:
    """Show the PNG files of {name: path} embedded in the page: no server serves them."""
    for name, path in files.items():
        if name.endswith(".png") and path.stat().st_size <= LARGEST_PICTURE:
            data = base64.b64encode(path.read_bytes()).decode()
            key = _key(name.removesuffix(".png"))
            create_image_artifact(f"data:image/png;base64,{data}", key=key, description=name)


def show_tracking(uri: str, experiment_id: str, run_id: str) -> None:
    """Link to the run in MLflow, or show how to open the local pages."""
    page = f"/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    if uri.startswith("http"):
        text = f"[This run in MLflow]({uri.rstrip('/')}{page})"
    else:
        text = f"This run in MLflow: start `mlflow ui` at the workspace root, then open `http://127.0.0.1:5000{page}`"
    create_markdown_artifact(text, key="mlflow", description="Curves, grids and comparison with other runs")


def _key(name: str) -> str:
    """Return an artifact key: only lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
