"""The contents of an evaluation report: plots, table, pictures and facts, composed from measured rows."""

import csv
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flows.data.dataset import Dataset
from flows.data.feature_files import FeatureFiles
from flows.reports.figures import save_grid, save_lines, save_montage
from flows.reports.html import Report, Section, TableRow

MONTAGE_GRIDS = 4  # training grids shown of a model
GRID_IMAGES = 100
SHOWN = {"fid": "FID ↓", "kid": "KID × 1000 ↓", "is": "IS ↑", "precision": "precision ↑", "recall": "recall ↑"}
SCALES, DIGITS = {"kid": 1000.0}, {"is": 2, "kid": 2}  # in the table only
MODELS = {  # in the order of the table
    "real": "held-out images: the floor",
    "untrained": "student before training: the ceiling",
    "student": "student, network calls {nfe}, sigma {sigmas}",
    "teacher": "teacher, network calls {nfe}",
}


@dataclass(frozen=True)
class Row:
    """A set of images, its origin and its metrics."""

    name: str
    model: str  # key of MODELS
    nfe: int | None
    sigmas: Sequence[float]
    images: np.ndarray  # uint8 [N, H, W, C], memory-mapped
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifacts:
    """Inputs of an evaluation that the report shows."""

    dataset: Dataset
    files: FeatureFiles
    samples: Mapping[str, Any]  # samples.json
    sample_dir: Path
    teacher_dir: Path
    student_dir: Path
    edit_dir: Path
    edits: Mapping[str, Any]  # edit.json


def compose_report(rows: Sequence[Row], artifacts: Artifacts, protocol: Mapping[str, Any], plots: Path) -> Report:
    """Draw the plots into the folder `plots` and return the report page."""
    trainings = {"student": artifacts.student_dir, "teacher": artifacts.teacher_dir}
    sections = [
        _plot_fid(rows, artifacts.files, plots),
        *_show_grids(artifacts, plots),
        *_show_edits(artifacts),
        *_show_trainings(trainings, plots),
    ]
    return Report(
        title=f"Consistency model: {artifacts.dataset.name}",
        facts=_facts(artifacts),
        columns=["", *(SHOWN[key] for key in _shown(rows)), "images"],
        rows=_table(rows),
        sections=sections,
        protocol=_readable(protocol),
    )


def _plot_fid(rows: Sequence[Row], files: FeatureFiles, plots: Path) -> Section:
    """Write fid.csv and fid_against_nfe.png."""
    fid = {row.name: row.metrics["fid"] for row in rows}
    with (plots / "fid.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "nfe", "fid"])
        writer.writerows([row.name, row.nfe, fid[row.name]] for row in rows)
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.model in ("student", "teacher") and row.nfe is not None:
            points.setdefault(row.model, []).append((row.nfe, fid[row.name]))
    path = plots / "fid_against_nfe.png"
    save_lines(
        {model: tuple(zip(*sorted(pairs), strict=True)) for model, pairs in points.items()},
        path,
        xlabel="network calls an image (NFE)",
        ylabel=f"FID ({files.short_name})",
        title="FID against network calls",
        markers=True,
        log_x=True,
        log_y=min(fid.values()) > 0,
        levels={row.name: fid[row.name] for row in rows if row.model in ("real", "untrained")},
    )
    return Section("FID against network calls", {"": path})


def _show_grids(artifacts: Artifacts, plots: Path) -> list[Section]:
    """Copy the denoising strips; draw held-out images as a grid comparable with the samples."""
    samples, sample_dir, heldout = artifacts.samples, artifacts.sample_dir, artifacts.dataset.heldout_images
    strips = plots / "strips.png"
    shutil.copyfile(sample_dir / samples["strips"], strips)
    order = sorted(samples["rows"], key=lambda row: row["model"] == "untrained")
    grids = {row["name"]: sample_dir / samples["grids"][row["name"]] for row in order}
    if len(heldout):
        save_grid(heldout[:GRID_IMAGES], plots / "real_grid.png")
        grids = {"real": plots / "real_grid.png"} | grids
    return [Section("Samples", grids), Section("Denoising", {"": strips})]


def _show_edits(artifacts: Artifacts) -> list[Section]:
    """Show the editing gallery, one picture per task with its measured errors."""
    tasks = artifacts.edits["tasks"].items()
    pictures = {_edit_label(name, facts): artifacts.edit_dir / facts["picture"] for name, facts in tasks}
    return [Section("Editing", pictures)] if pictures else []


def _edit_label(name: str, facts: Mapping[str, Any]) -> str:
    calls = f"{name}, {facts['nfe']} network call" + ("s" if facts["nfe"] > 1 else "")
    if "rmse" not in facts:
        return calls
    return f"{calls}; off by {facts['rmse']:.1f} of 255 (given: {facts['rmse_given']:.1f})"


def _show_trainings(folders: Mapping[str, Path], plots: Path) -> list[Section]:
    """Draw the loss curves and some training grids of teacher and student; skip an absent model."""
    sections = []
    grids = {name: path for model, folder in folders.items() for name, path in _some_grids(model, folder).items()}
    if grids:
        save_montage(grids, plots / "grids_over_training.png", columns=MONTAGE_GRIDS)
        sections.append(Section("Grids over training", {"": plots / "grids_over_training.png"}))
    curves = {model: curve for model, folder in folders.items() if (curve := _loss_curve(folder))}
    if curves:
        losses = [loss for _, ys in curves.values() for loss in ys]
        save_lines(
            curves, plots / "loss.png", xlabel="step", ylabel="loss", title="Training loss", log_y=min(losses) > 0
        )
        sections.append(Section("Loss", {"": plots / "loss.png"}))
    return sections


def _some_grids(model: str, folder: Path) -> dict[str, Path]:
    """Pick evenly spaced grids, including the last."""
    paths = sorted((folder / "grids").glob("step_*.png"))
    count = min(MONTAGE_GRIDS, len(paths))
    chosen = [paths[(index + 1) * len(paths) // count - 1] for index in range(count)]
    return {f"{model}, step {int(path.stem.removeprefix('step_'))}": path for path in chosen}


def _loss_curve(folder: Path) -> tuple[list[float], list[float]] | None:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    return ([entry["step"] for entry in entries], [entry["loss"] for entry in entries]) if entries else None


def _facts(artifacts: Artifacts) -> dict[str, str]:
    dataset, files = artifacts.dataset, artifacts.files
    channels, height, width = dataset.image_shape
    facts = {
        "Data": f"{dataset.name}, {channels} × {height} × {width}",
        "Images": f"{len(dataset.train_images):,} to train, {len(dataset.heldout_images):,} held out",
        "Student": _describe_model(artifacts.student_dir),
        "Teacher": _describe_model(artifacts.teacher_dir),
        "Feature network": files.kind,
    }
    if files.accuracy is not None:
        facts["Its accuracy"] = f"{files.accuracy:.1%} of the held-out images"
    return facts | _describe_noise(artifacts.student_dir)


def _describe_model(folder: Path) -> str:
    """Describe the model in `folder`: network, parameters, length of training."""
    spec = _read_spec(folder)
    if spec is None:
        return "none"
    words = [spec["network"]["kind"]]
    weights = folder / "ema.safetensors"
    if weights.exists():
        words.append(f"{_count_parameters(weights):,} parameters")
    curve = _loss_curve(folder)
    if curve:
        words.append(f"{int(curve[0][-1]):,} steps")
    return ", ".join(words)


def _describe_noise(folder: Path) -> dict[str, str]:
    spec = _read_spec(folder)
    if spec is None:
        return {}
    noise = spec["noise"]
    return {"Noise levels": f"{noise['sigma_min']:g} to {noise['sigma_max']:g}, data {noise['sigma_data']:g}"}


def _read_spec(folder: Path) -> dict[str, Any] | None:
    path = folder / "model.json"
    return json.loads(path.read_text()) if path.exists() else None


def _count_parameters(weights: Path) -> int:
    from safetensors import safe_open

    with safe_open(weights, framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def _shown(rows: Sequence[Row]) -> list[str]:
    return [key for key in SHOWN if key in rows[0].metrics]


def _table(rows: Sequence[Row]) -> list[TableRow]:
    fid = {row.name: row.metrics["fid"] for row in rows}
    return [
        TableRow(
            name=row.name,
            note=MODELS[row.model].format(nfe=row.nfe, sigmas=", ".join(f"{sigma:g}" for sigma in row.sigmas)),
            cells=[*(_format(key, row.metrics) for key in _shown(rows)), f"{len(row.images):,}"],
            bar=_position(fid[row.name], fid.get("real"), fid.get("untrained")),
            bound=row.model in ("real", "untrained"),
        )
        for row in rows
    ]


def _position(fid: float, floor: float | None, ceiling: float | None) -> float | None:
    """Place a FID between floor (0) and ceiling (1) on a logarithmic scale; None if undefined."""
    if floor is None or ceiling is None or not 0 < floor < ceiling or fid <= 0:
        return None
    return min(1.0, max(0.0, math.log(fid / floor) / math.log(ceiling / floor)))


def _format(key: str, found: Mapping[str, float]) -> str:
    scale, digits = SCALES.get(key, 1.0), DIGITS.get(key, 3)
    text = f"{found[key] * scale:.{digits}f}"
    spread = found.get(f"{key}_std", 0.0)  # 0: a single part
    return f"{text} ± {spread * scale:.{digits}f}" if spread else text


def _readable(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Flatten the protocol for the page, without the rows' counts, which the table has."""
    network, reference = protocol["network"], protocol["reference"]
    settings = {key: value for key, value in protocol["settings"].items() if key not in ("batch_size", "beside_fid")}
    rows = protocol["rows"].items()
    return {
        "Reference": f"{reference['images']}, the same for every row; SHA-256 {reference['sha256']}",
        "Feature network": f"{network['name']}, {network['feature_dim']} features; SHA-256 {network['sha256']}",
        "Samples": "; ".join(f"{key} {value}" for key, value in protocol["samples"].items()),
        "Computed by": f"torch-fidelity {protocol['torch_fidelity']}",
        "Settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        "Parts of IS": ", ".join(f"{name} {row['isc_splits']}" for name, row in rows),
        "Subsets of KID": ", ".join(f"{name} {row['kid_subset_size']}" for name, row in rows),
    }
