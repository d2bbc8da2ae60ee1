"""Stage `evaluate`: compare every row of samples with the training images; write metrics, plots and a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from cm_core.metrics.evaluation import MetricParams, Reference, evaluate_images
from cm_core.metrics.features import build_extractor
from flows.data.dataset import Dataset, load_dataset
from flows.data.feature_files import FeatureFiles, load_feature_files
from flows.errors import UserError
from flows.monitor import Monitor
from flows.reports.evaluation import MODELS, Artifacts, Row, compose_report
from flows.reports.html import write_report


class Evaluate(MetricParams):
    """The metrics and their settings."""

    batch_size: int = Field(250, ge=1)
    """Images per batch of the feature network; changes the metrics by rounding alone."""


def evaluate(
    evaluate: Evaluate,
    prepare_dir: Path,
    features_dir: Path,
    teacher_dir: Path,
    student_dir: Path,
    sample_dir: Path,
    edit_dir: Path,
    out_dir: Path,
    monitor: Monitor,
) -> None:
    """Write metrics.json, protocol.json, plots/ and report.html.

    Raises UserError for an artifact that is missing or belongs to other data, or a row with too few images.
    """
    dataset, files = load_dataset(prepare_dir), load_feature_files(features_dir)
    samples = _read_index(sample_dir / "samples.json", "no samples here; the stage sample writes them")
    edits = _read_index(edit_dir / "edit.json", "no edited images here; the stage edit makes them")
    rows = _read_rows(samples, sample_dir, dataset, evaluate, monitor)
    _refuse_unusable(rows, dataset, files, evaluate)
    rows = _measure(rows, files, evaluate, monitor)
    protocol = _protocol(rows, dataset, files, samples, evaluate)
    artifacts = Artifacts(dataset, files, samples, sample_dir, teacher_dir, student_dir, edit_dir, edits)
    plots = out_dir / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    write_report(compose_report(rows, artifacts, protocol, plots), out_dir / "report.html")
    metrics = _by_metric(rows, files.short_name)
    _write_json(out_dir / "protocol.json", protocol)
    _write_json(out_dir / "metrics.json", metrics)
    monitor.metrics({f"{key}/{row}": value for key, by_row in metrics.items() for row, value in by_row.items()}, 0)
    for picture in sorted(plots.glob("*.png")):
        monitor.image(picture.stem, picture, 0)


def _read_index(path: Path, absent: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: {absent}") from None


def _read_rows(
    samples: dict[str, Any], sample_dir: Path, dataset: Dataset, evaluate: Evaluate, monitor: Monitor
) -> list[Row]:
    """Return the rows in the order of the table: real, untrained, student, teacher."""
    rows = [
        Row(entry["name"], entry["model"], entry["nfe"], entry["sigmas"], np.load(sample_dir / entry["file"], "r"))
        for entry in samples["rows"]
    ]
    if len(dataset.heldout_images) > evaluate.prc_neighbourhood:
        rows.append(Row("real", "real", None, (), dataset.heldout_images))
    else:
        monitor.remark(f"no row `real`: only {len(dataset.heldout_images)} images are held out")
    return sorted(rows, key=lambda row: list(MODELS).index(row.model))


def _refuse_unusable(rows: Sequence[Row], dataset: Dataset, files: FeatureFiles, evaluate: Evaluate) -> None:
    if files.reference_sha256 != dataset.sha256["train"]:
        raise UserError(f"{files.weights.parent}: made from other images than those prepared; run the stage features")
    shape = dataset.train_images.shape[1:]
    for row in rows:
        if row.images.shape[1:] != shape:
            raise UserError(f"row {row.name}: images are {row.images.shape[1:]}, the data set's {shape}")
        try:
            evaluate.adapted_to(len(row.images))
        except ValueError as error:
            raise UserError(f"row {row.name}: {error}; raise sample.num_images") from error


def _measure(rows: Sequence[Row], files: FeatureFiles, evaluate: Evaluate, monitor: Monitor) -> list[Row]:
    """Return the rows with their metrics, all against the same reference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = build_extractor(files.extractor, files.weights, device)
    reference = Reference.of(torch.from_numpy(np.array(files.reference)))
    total, measured, before = sum(len(row.images) for row in rows), [], 0
    for row in rows:
        metrics = evaluate_images(
            row.images,
            reference,
            extractor,
            params=evaluate,
            batch_size=evaluate.batch_size,
            device=device,
            on_batch=partial(lambda before, done, _: monitor.progress(before + done, total, "images"), before),
        )
        measured.append(replace(row, metrics=metrics))
        before += len(row.images)
    return measured


def _by_metric(rows: Sequence[Row], short_name: str) -> dict[str, dict[str, float]]:
    """Return {<metric>_<network>: {row: value}}, spreads left out."""
    keys = [key for key in rows[0].metrics if not key.endswith("_std")]
    return {f"{key}_{short_name}": {row.name: row.metrics[key] for row in rows} for key in keys}


def _protocol(
    rows: Sequence[Row],
    dataset: Dataset,
    files: FeatureFiles,
    samples: Mapping[str, Any],
    evaluate: Evaluate,
) -> dict[str, Any]:
    """Return all settings and inputs that decide the numbers."""
    return {
        "reference": {"images": f"{len(files.reference)} training images", "sha256": files.reference_sha256},
        "network": {"name": files.extractor, "sha256": files.sha256, "feature_dim": files.reference.shape[1]},
        "samples": {key: samples[key] for key in ("seed", "rounding", "precision", "labels") if key in samples},
        "heldout": {"sha256": dataset.sha256["heldout"]},
        "torch_fidelity": version("torch-fidelity"),
        "settings": evaluate.model_dump(mode="json"),
        "rows": {row.name: _row_protocol(row, evaluate, len(files.reference)) for row in rows},
    }


def _row_protocol(row: Row, evaluate: Evaluate, reference_images: int) -> dict[str, Any]:
    adapted = evaluate.adapted_to(min(len(row.images), reference_images))
    return {
        "model": row.model,
        "nfe": row.nfe,
        "sigmas": list(row.sigmas),
        "num_images": len(row.images),
        "isc_splits": adapted.isc_splits,
        "kid_subset_size": adapted.kid_subset_size,
        **{key: value for key, value in row.metrics.items() if key.endswith("_std")},
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
