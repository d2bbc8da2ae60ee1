"""Prefect artifacts of a flow run: live progress, the data report, and one page with the result."""

import base64
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)

from flows.reports.metrics_table import by_row
from flows.settings import Settings
from flows.storage.s3 import public_uri

logger = logging.getLogger(__name__)
CLASSES_SHOWN = 50
MOST_BYTES = 4 * 2**20  # of a run's pictures, which are stored in Prefect's database
WIDTH = 720  # pixels of Prefect's page for a picture, in a window of 1280
SHOWN = {"Samples": "sample/", "Edits": "edit/", "Evaluation": "evaluate/"}  # pictures by their stage
REPORT = "evaluate/report.html"


class ProgressArtifact:
    """A stage's progress artifact, created at its first progress report."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._id: Any = None

    def show(self, progress: Mapping[str, Any]) -> None:
        """Show {done, total, unit}; an unreachable server does not stop a training."""
        percent = 100 * progress["done"] / max(progress["total"], 1)
        text = f"{self._stage}: {progress['done']:,} of {progress['total']:,} {progress['unit']}"
        try:
            if self._id is None:
                self._id = create_progress_artifact(percent, key=_key(f"progress-{self._stage}"), description=text)
            else:
                update_progress_artifact(self._id, percent, description=text)
        except httpx.HTTPError as error:
            logger.warning("%s: progress is not shown, the stage continues: %s", self._stage, error)


def show_data_report(path: Path) -> None:
    """Show the report.json of the stage `prepare`, what it found out about the images; MLflow has the whole page."""
    report = json.loads(path.read_text())
    images, duplicates = report["images"], report["duplicates"]
    lines = [f"**{report['name']}**: {images['train']:,} training images, {images['heldout']:,} held out", ""]
    lines += [f"- {_plain(finding)}" for finding in report["findings"]] or ["Nothing stands out."]
    lines += ["", "| class | training | held out |", "| --- | ---: | ---: |"] if report["classes"] else []
    shown = report["classes"][:CLASSES_SHOWN]
    lines += [f"| {_plain(one['name'])} | {one['train']:,} | {one['heldout']:,} |" for one in shown]
    if len(report["classes"]) > CLASSES_SHOWN:
        lines += ["", f"... and {len(report['classes']) - CLASSES_SHOWN} classes more"]
    lines += ["", "| duplicates | in training | in held-out | leaks |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {kind} | {one['train']} | {one['heldout']} | {one['leaks']} |"
        for kind, one in ((kind, duplicates[kind]) for kind in ("exact", "near"))
    ]
    create_markdown_artifact("\n".join(lines), key="data-report", description="The images, as prepared")


def _plain(text: str) -> str:
    """Return a name from outside as text that Markdown and HTML take for nothing else."""
    return re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", text)


def show_result(
    said: str,
    metrics: Mapping[str, Mapping[str, float]],
    pictures: Mapping[str, Path],
    links: Sequence[str],
    svg: str = "",
) -> None:
    """Show what a run found on one page: its line, {metric: {images: value}}, {name: PNG}, links and its lineage.

    Pictures are shown of the stages `sample`, `edit` and `evaluate`, by the beginning of their names.
    """
    parts = [" · ".join(links), _table(metrics)]
    room, shown = MOST_BYTES, set[str]()
    for heading, prefix in SHOWN.items():
        found = {name: file for name, file in pictures.items() if name.startswith(prefix) and name.endswith(".png")}
        new = {name: file for name, file in found.items() if _words(name) not in shown}
        shown |= {_words(name) for name in new}
        for place, (name, file) in enumerate(new.items()):
            data = enlarged(file)
            room -= len(data)
            if room > 0:
                parts += [f"### {heading}"] * (place == 0) + [f"{_words(name)}\n\n{_picture(data, 'png', name)}"]
    parts += ["### Lineage", _picture(svg.encode(), "svg+xml", "lineage")] if svg else []
    create_markdown_artifact("\n\n".join(parts), key="result", description=said)


def _table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return {metric: {images: value}} in Markdown, a line for each row of images, four digits a number."""
    network, rows = by_row(metrics)
    names = [key.partition("_")[0] for key in metrics]
    lines = [["images", *(name.upper() if len(name) < 4 else name for name in names)], ["---", *["---:"] * len(names)]]
    for row, values in rows.items():
        lines.append([_words(row), *(f"{values[name]:#.4g}" if name in values else "" for name in names)])
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", f"Measured by {_plain(network)}."])


def enlarged(file: Path) -> bytes:
    """Return a PNG of a small picture by a whole factor, about WIDTH pixels wide: a browser would blur it."""
    from PIL import Image

    with Image.open(file) as picture:
        factor = WIDTH // picture.width
        if factor < 2:
            return file.read_bytes()
        larger = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    larger.save(stream, format="PNG")
    return stream.getvalue()


def _picture(data: bytes, kind: str, name: str) -> str:
    return f"![{_words(name)}](data:image/{kind};base64,{base64.b64encode(data).decode()})"


def _words(name: str) -> str:
    """Return the name of a row of images, or of its picture, such as `teacher 35 calls`."""
    text = re.sub(r"nfe_(\d+)", r"\1_calls", Path(name).stem.removesuffix("_grid"))
    return re.sub(r"\b1 calls", "1 call", text.replace("_", " "))


def links_to(uri: str, experiment_id: str, run_id: str, model: str = "") -> list[str]:
    """Return links to a run in MLflow and, of one that made a model, its report and that; or how to open the pages."""
    uri, run = Settings.read().mlflow_url or public_uri(uri), f"/#/experiments/{experiment_id}/runs/{run_id}"
    page = f"{run}?workflowType=machine_learning"  # MLflow opens its view for language models otherwise
    if not uri.startswith("http"):
        return [f"This run in MLflow: `make ui` in the workspace, then open `http://127.0.0.1:5000{page}`"]
    places = {"This run in MLflow": page}
    if model:
        places = {"Report": f"{run}/artifacts/{REPORT}", **places, "Model": f"/#/models/{model}"}
    return [f"[{name}]({uri.rstrip('/')}{place})" for name, place in places.items()]


def _key(name: str) -> str:
    """Return an artifact key: only lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
