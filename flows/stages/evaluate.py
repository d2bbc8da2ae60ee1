"""Stage `evaluate`: compare every row of samples with the training images; write metrics, plots and a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn

from cm_core.metrics.evaluation import (
    MOST_KEPT,
    SUBSET_SEED,
    MetricParams,
    Reference,
    compare,
    frechet_distance,
    random_rows,
)
from cm_core.metrics.features import NETWORKS, ImageFeatures, build_extractor, extract_features
from cm_core.metrics.neighbours import nearest
from cm_core.metrics.uncertainty import deviations
from flows.data.dataset import Dataset, load_dataset
from flows.data.feature_files import FeatureFiles, load_feature_files
from flows.errors import UserError
from flows.monitor import Monitor
from flows.reports.evaluation import write_report
from flows.reports.metrics_table import CURVES, short_keys
from flows.reports.rows import MODELS, Artifacts, Neighbours, Row, of_student

SETS = "sets"  # in the student's artifact (flows/stages/training.py)
# In a model's artifact. Not imported: with cm_core.model this stage would depend on all networks.
SPEC_FILE, EMAS_FILE = "model.json", "emas.json"
NEIGHBOURS, QUERIES = 3, 1_000  # nearest training images of an image; images of which they are looked for, at most
SAMPLE_FACTS = ("seed", "rounding", "precision", "labels", "guidance")
ROW_FACTS = ("name", "model", "ema", "nfe", "sigmas")


class Evaluate(MetricParams):
    """The metrics and their settings."""

    batch_size: int = Field(250, ge=1)
    """Images per batch of the feature network; changes the metrics by rounding alone."""
    repeats: int = Field(1, ge=1)
    """Consecutive sets into which the images of each row are divided. Metrics are means over the sets, and FID has its
    minimum and spread beside it; three sets of 50,000, as EDM reports, are sample.num_images=150000."""


def evaluate(
    evaluate: Evaluate,
    prepare_dir: Path,
    features_dir: Path,
    teacher_dir: Path,
    base_dir: Path,
    student_dir: Path,
    sample_dir: Path,
    edit_dir: Path,
    out_dir: Path,
    monitor: Monitor,
) -> None:
    """Write metrics.json, a file of rows/ for each row of it, protocol.json, plots/ and report.html.

    Raises UserError for an artifact that is missing or belongs to other data, or a row with too few images.
    """
    dataset, files = load_dataset(prepare_dir), load_feature_files(features_dir)
    samples = _read_index(sample_dir / "samples.json", "no samples here; the stage sample writes them")
    edits = _read_index(edit_dir / "edit.json", "no edited images here; the stage edit makes them")
    rows = _read_rows(samples, sample_dir, dataset, evaluate, monitor)
    _refuse_unusable(rows, dataset, files, evaluate)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = build_extractor(files.extractor, files.weights, device)
    rows = _measure(rows, dataset, files, extractor, evaluate, device, monitor)
    over_training = _measure_over_training(student_dir / SETS, files, extractor, evaluate, device)
    spec = _read_index(student_dir / SPEC_FILE, "no model here; the stage student writes it")
    protocol = {
        "data": _data(dataset, spec),
        "noise": spec["noise"],
        **_protocol(rows, files, samples, evaluate, {"student": _emas(student_dir), "teacher": _emas(teacher_dir)}),
        "heldout": {"sha256": dataset.sha256["heldout"]},
    }
    models = {"Student": student_dir, "Base": base_dir, "Teacher": teacher_dir}
    artifacts = Artifacts(dataset, files, samples, sample_dir, models, edit_dir, edits, over_training)
    plots, by_row = out_dir / "plots", out_dir / "rows"
    for folder in (plots, by_row):
        folder.mkdir(parents=True, exist_ok=True)
    write_report(rows, artifacts, protocol, plots)
    metrics = _by_metric(rows, files.short_name)
    _write_json(out_dir / "protocol.json", protocol)
    _write_json(out_dir / "metrics.json", metrics)
    for row in rows:
        _write_json(by_row / f"{row.name}.json", {"features": files.short_name, **row.without_deviations})
    monitor.metrics(short_keys(metrics), 0)
    for step, fids in over_training.items():
        monitor.metrics({f"{CURVES}fid_over_training_{row}": fid for row, fid in fids.items()}, step)
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
        Row(
            images=np.load(sample_dir / entry["file"], "r"),
            sets=evaluate.repeats,
            width=entry.get("width"),  # of averages rebuilt after the training
            guidance=entry.get("guidance"),  # of rows beside those at the student's own weight
            **{key: entry[key] for key in ROW_FACTS},
        )
        for entry in samples["rows"]
    ]
    if len(dataset.heldout_images) > evaluate.prc_neighbourhood:
        rows.append(Row("real", "real", 0, None, (), dataset.heldout_images))
    else:
        monitor.remark(f"no row `real`: only {len(dataset.heldout_images)} images are held out")
    return sorted(rows, key=lambda row: list(MODELS).index(row.model))


def _refuse_unusable(rows: Sequence[Row], dataset: Dataset, files: FeatureFiles, evaluate: Evaluate) -> None:
    if files.data_sha256 != dataset.sha256["train"]:
        raise UserError(f"{files.weights.parent}: made from other images than those prepared; run the stage features")
    shape = dataset.train_images.shape[1:]
    for row in rows:
        if row.images.shape[1:] != shape:
            raise UserError(f"row {row.name}: images are {row.images.shape[1:]}, the data set's {shape}")
        try:
            evaluate.adapted_to(row.num_images, files.reference)
        except ValueError as error:
            raise UserError(f"row {row.name}: {error}; raise sample.num_images") from error


def _measure_over_training(
    folder: Path, files: FeatureFiles, extractor: nn.Module, evaluate: Evaluate, device: torch.device
) -> dict[int, dict[str, float]]:
    """Return {step: {row: FID}} of the sets of images that the training drew, if it did."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("step_*.npy")):
        step, _, row = path.stem.removeprefix("step_").partition("-")
        images = np.load(path, mmap_mode="r")
        features = extract_features(images, extractor, batch_size=evaluate.batch_size, device=device).features
        found.setdefault(int(step), {})[row] = frechet_distance(features, files.reference)
    return found


def _measure(
    rows: Sequence[Row],
    dataset: Dataset,
    files: FeatureFiles,
    extractor: nn.Module,
    evaluate: Evaluate,
    device: torch.device,
    monitor: Monitor,
) -> list[Row]:
    """Return the rows with their metrics, all against the same reference, and neighbours of the student's and real."""
    total, measured, before = sum(len(row.images) for row in rows), [], 0
    compared = {"real", *(row.name for row in of_student(rows)[:1])}
    counts = {row.name: row.num_images for row in rows}
    queries = min([QUERIES, *(count for name, count in counts.items() if name in compared)])
    for row in rows:
        found, first = [], None  # metrics of each set; features of the first
        for images in row.by_set():

            def progress(done: int, _: int, before: int = before) -> None:
                monitor.progress(before + done, total, "images")

            features = extract_features(
                images, extractor, batch_size=evaluate.batch_size, device=device, on_batch=progress
            )
            before, first = before + len(images), first or features
            found.append(_metrics_of(features, files.reference, evaluate, alone=row.sets == 1))
        assert first is not None, "every row has images"
        equal = {}
        if len(set(counts.values())) > 1:
            equal = _metrics_of(_some(first, min(counts.values())), files.reference, evaluate)
        neighbours = _neighbours(first, queries, dataset, files.reference) if row.name in compared else None
        measured.append(replace(row, metrics=over_sets(found), equal=equal, neighbours=neighbours))
    return measured


def _metrics_of(
    found: ImageFeatures, reference: Reference, evaluate: Evaluate, *, alone: bool = True
) -> dict[str, float]:
    """Return the metrics of a set of images; if it is the only one, also estimate their deviations between sets."""
    params = evaluate.adapted_to(len(found.features), reference)
    metrics = compare(found, reference, params)
    return {**metrics, **deviations(found, reference, params, metrics)} if alone else metrics


def _some(found: ImageFeatures, count: int) -> ImageFeatures:
    rows = random_rows(len(found.features), count)
    return ImageFeatures(found.features[rows], None if found.logits is None else found.logits[rows])


def _neighbours(found: ImageFeatures, queries: int, dataset: Dataset, reference: Reference) -> Neighbours | None:
    """Return the nearest training images of some images; None where the reference is not of training images."""
    if reference.features is None:
        return None
    rows, kept = random_rows(len(found.features), queries), random_rows(len(dataset.train_images), MOST_KEPT)
    distances, indices = nearest(found.features[rows], reference.features, NEIGHBOURS)
    return Neighbours(rows.numpy(), distances.cpu().numpy(), kept[indices.cpu()].numpy())


def over_sets(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over sets of images with its standard deviation, and FID's minimum and spread.

    Those of a single set are returned as they are.
    """
    if len(found) == 1:
        return dict(found[0])
    metrics: dict[str, float] = {}
    for key in (key for key in found[0] if not key.endswith("_std")):
        values = [one[key] for one in found]
        metrics |= {key: float(np.mean(values)), f"{key}_std": float(np.std(values, ddof=1))}
        if key == "fid":
            metrics |= {"fid-min": min(values), "fid-spread": max(values) - min(values)}
    return metrics


def _by_metric(rows: Sequence[Row], short_name: str) -> dict[str, dict[str, float]]:
    """Return {<metric>_<network>: {row: value}}, spreads left out."""
    keys = dict.fromkeys(key for row in rows for key in row.without_deviations)
    return {f"{key}_{short_name}": {row.name: row.metrics[key] for row in rows if key in row.metrics} for key in keys}


def _data(dataset: Dataset, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of the training images."""
    return {
        "name": dataset.name,
        "sha256": dataset.sha256["train"],
        "images": len(dataset.train_images),
        "image_shape": list(dataset.image_shape),
        "resize": dataset.resize,
        "classes": dataset.num_classes,
        "conditional": bool(spec.get("num_classes")),
    }


def _emas(model_dir: Path) -> list[dict[str, Any]]:
    """Return the rules of a model's averages; none of a model that was not trained here."""
    path = model_dir / EMAS_FILE
    return json.loads(path.read_text()) if path.exists() else []


def _protocol(
    rows: Sequence[Row],
    files: FeatureFiles,
    samples: Mapping[str, Any],
    evaluate: Evaluate,
    emas: Mapping[str, Sequence[dict[str, Any]]],
) -> dict[str, Any]:
    """Return the settings and inputs that decide the numbers, those of the data excepted."""
    samplers = {entry["name"]: entry.get("sampler") for entry in samples["rows"]}
    facts, dim = NETWORKS[files.extractor], len(files.reference.statistics.mu)
    network = {"name": files.extractor, "sha256": files.sha256, "feature_dim": dim}
    return {
        "reference": {**files.described, "features_kept": _kept(files)},
        "network": {**network, "layer": facts.layer, "resize": facts.resize},
        "samples": {key: samples[key] for key in SAMPLE_FACTS if key in samples},
        "torch_fidelity": version("torch-fidelity"),
        "torch": torch.__version__,
        "settings": evaluate.model_dump(mode="json"),
        "subset_seed": SUBSET_SEED,
        "weights": "of the last training step, none chosen by its metrics",
        "rows": {
            row.name: _row_protocol(row, evaluate, files, samplers.get(row.name)) | {"ema_rule": _rule(row, emas)}
            for row in rows
        },
    }


def _kept(files: FeatureFiles) -> int:
    return 0 if files.reference.features is None else len(files.reference.features)


def _rule(row: Row, emas: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, Any] | None:
    """Return the rule of a row's average; None of images and weights without one, or where it is not known."""
    if row.width is not None:
        return {"kind": "power", "width": row.width}
    rules = emas.get(row.model, ())
    return rules[row.ema] if row.ema < len(rules) else None


def _row_protocol(row: Row, evaluate: Evaluate, files: FeatureFiles, sampler: dict[str, Any] | None) -> dict[str, Any]:
    adapted = evaluate.adapted_to(row.num_images, files.reference)
    return {
        "model": row.model,
        "ema": row.ema,
        **({} if row.width is None else {"width": row.width}),
        **({} if row.guidance is None else {"guidance": row.guidance}),
        "nfe": row.nfe,
        "sigmas": list(row.sigmas),
        "sampler": sampler,
        "sets": row.sets,
        "num_images": row.num_images,
        "isc_splits": adapted.isc_splits,
        "kid_subset_size": adapted.kid_subset_size,
        **{key: value for key, value in row.metrics.items() if key.endswith("_std")},
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
