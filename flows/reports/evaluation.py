"""The evaluation report, one self-contained HTML page of deterministic bytes: sentence, metrics, plots, pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.reports.metrics_table import SCALES, SHOWN, three_digits
from flows.reports.page import write_page
from flows.reports.rows import NUMBERS, Artifacts, Row, in_calls, of_student, with_deviation
from flows.reports.sections import loss_curve, sections

TEMPLATE = "templates/report.html"
METHODS = {"ict": "iCT", "scm": "sCM", "cm_inf": "CM∞"}  # in papers; others are written in capitals
ABSENT = "none"  # in place of the description of a model that the recipe has not
PUBLISHED = "inception"  # features whose FIDs compare with those of papers


def write_report(rows: Sequence[Row], artifacts: Artifacts, protocol: Mapping[str, Any], plots: Path) -> None:
    """Draw the plots into the folder `plots`, and write report.html beside it."""
    tables = [{"note": "", **_table(rows)}]
    if any(row.equal for row in rows):
        count = min(row.num_images for row in rows)
        equal = [replace(row, images=row.images[:count], sets=1, metrics=row.equal) for row in rows]
        tables.append({"note": f"{count:,} images of every row", **_table(equal)})
    write_page(
        plots.with_name("report.html"),
        TEMPLATE,
        title=f"{artifacts.dataset.name}: {sentence(rows, _method(artifacts.models['Student']))}",
        dataset=artifacts.dataset.name,
        sentence=sentence(rows, _method(artifacts.models["Student"])),
        scale=_scale(rows, artifacts),
        facts=_facts(artifacts),
        tables=tables,
        sections=sections(rows, artifacts, plots),
        protocol=_readable(protocol),
    )


def sentence(rows: Sequence[Row], method: str) -> str:
    """Return the result in a sentence: the student at its fewest calls, and the teacher."""
    student = of_student(rows)[0]
    said = (
        f"{method or 'The student'} reaches FID {three_digits(student.metrics['fid'])} in {in_calls(student.nfe or 0)}"
    )
    teachers = [row for row in rows if row.model == "teacher" and row.ema == 0]
    for row in teachers[:1]:
        number = NUMBERS[row.nfe] if row.nfe and row.nfe < len(NUMBERS) else f"{row.nfe:,}"
        said += f", the teacher {three_digits(row.metrics['fid'])} in {number}"
    return f"{said}."


def _method(student_dir: Path) -> str:
    """Return the name of the student's method; empty for one that was not trained here."""
    path = student_dir / "origin.json"
    kind = json.loads(path.read_text()).get("method", "") if path.exists() else ""
    return METHODS.get(kind, kind.upper())


def _scale(rows: Sequence[Row], artifacts: Artifacts) -> str:
    """Return what calibrates the sentence: floor, ceiling, and what the numbers compare with."""
    fid = {row.model: three_digits(row.metrics["fid"]) for row in rows if row.model in ("real", "untrained")}
    said = [f"Held-out images, as close as a perfect generator comes: {fid['real']}."] if "real" in fid else []
    said += [f"The student before its training: {fid['untrained']}."] if "untrained" in fid else []
    if artifacts.files.short_name != PUBLISHED:
        said.append(f"By features of the network {artifacts.files.kind}: not comparable with published FIDs.")
    return " ".join(said)


def _facts(artifacts: Artifacts) -> dict[str, str]:
    dataset, files = artifacts.dataset, artifacts.files
    channels, height, width = dataset.image_shape
    facts = {
        "Data": f"{dataset.name}, {channels} × {height} × {width}",
        "Images": f"{len(dataset.train_images):,} to train, {len(dataset.heldout_images):,} held out",
        "Student": _describe_model(artifacts.models["Student"]),
        **({"Base": base} if (base := _describe_model(artifacts.models["Base"])) != ABSENT else {}),
        "Teacher": _describe_model(artifacts.models["Teacher"]),
        "Feature network": files.kind,
    }
    if files.accuracy is not None:
        facts["Its accuracy"] = f"{files.accuracy:.1%} of the held-out images"
    if spec := _read_spec(artifacts.models["Student"]):
        low, high, spread = (spec["noise"][name] for name in ("sigma_min", "sigma_max", "sigma_data"))
        if spec.get("latents"):
            facts["Latents"] = " × ".join(map(str, spec["image_shape"]))
        facts["Noise levels"] = f"{low:g} to {high:g}, data {spread:g}"
    return facts


def _describe_model(folder: Path) -> str:
    """Describe the model in `folder`: network, parameters, length of training."""
    spec = _read_spec(folder)
    if spec is None:
        return ABSENT
    words = [spec["network"]["kind"]]
    weights = folder / "ema.safetensors"
    if weights.exists():
        words.append(f"{_count_parameters(weights):,} parameters")
    curve = loss_curve(folder)
    if curve:
        words.append(f"{int(curve[0][-1]):,} steps")
    return ", ".join(words)


def _read_spec(folder: Path) -> dict[str, Any] | None:
    path = folder / "model.json"
    return json.loads(path.read_text()) if path.exists() else None


def _count_parameters(weights: Path) -> int:
    from safetensors import safe_open

    with safe_open(weights, framework="np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the template's table; `bar`, in 0..1, lies beside FID, `bound` rows calibrate the others."""
    keys = [key for key in SHOWN if any(key in row.metrics for row in rows)]
    fid = {row.model: row.metrics["fid"] for row in rows}
    return {
        "columns": [*(SHOWN[key] for key in keys), "images"],
        "rows": [
            {
                "name": row.name,
                "title": row.title,
                "note": _note(row),
                "cells": [*(_cell(key, row.metrics) for key in keys), _count(row)],
                "bar": _position(row.metrics["fid"], fid.get("real"), fid.get("untrained")),
                "bound": row.model in ("real", "untrained"),
            }
            for row in rows
        ],
    }


def _note(row: Row) -> str:
    if row.model in ("real", "untrained"):
        return {"real": "the floor", "untrained": "the ceiling"}[row.model]
    if row.model == "student" and len(row.sigmas) > 1:
        return "σ " + ", ".join(f"{sigma:.4g}" for sigma in row.sigmas)
    return ""


def _count(row: Row) -> str:
    return f"{row.num_images:,}" if row.sets == 1 else f"{row.sets} × {row.num_images:,}"


def _position(fid: float, floor: float | None, ceiling: float | None) -> float | None:
    """Place a FID between floor (0) and ceiling (1) on a logarithmic scale; None if undefined."""
    if floor is None or ceiling is None or not 0 < floor < ceiling or fid <= 0:
        return None
    return min(1.0, max(0.0, math.log(fid / floor) / math.log(ceiling / floor)))


def _cell(key: str, found: Mapping[str, float]) -> str:
    if key not in found:
        return "–"
    scale = SCALES.get(key, 1.0)
    return with_deviation(found[key] * scale, found.get(f"{key}_std", 0.0) * scale)


def _words(rule: Mapping[str, Any]) -> str:
    return ", ".join(f"{value}" if key == "kind" else f"{key} {value}" for key, value in rule.items())


def _readable(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Flatten the protocol for the page, without the rows' counts, which the table has."""
    network, reference, data, noise = (protocol[key] for key in ("network", "reference", "data", "noise"))
    settings = {key: value for key, value in protocol["settings"].items() if key not in ("batch_size", "beside_fid")}
    rows = protocol["rows"].items()
    classes = f"{data['classes']} classes" + ("" if data["conditional"] else ", not told to the model")
    size = " × ".join(map(str, data["image_shape"][1:])) + ("" if data["resize"] == "none" else f" by {data['resize']}")
    return {
        "Training images": f"{data['images']:,} of {data['name']}, {size}, {classes}; SHA-256 {data['sha256']}",
        "Noise range": ", ".join(f"{key} {value}" for key, value in noise.items()),
        "Reference": f"{reference['images']}, the same for every row; SHA-256 {reference['sha256']}",
        "Feature network": f"{network['name']}, {network['feature_dim']} features of layer {network['layer']}, "
        f"resize {network['resize']}; SHA-256 {network['sha256']}",
        "Weights": protocol["weights"],
        "Averages": "; ".join(f"{name}: {_words(row['ema_rule'])}" for name, row in rows if row.get("ema_rule")),
        "Samples": "; ".join(f"{key} {value}" for key, value in protocol["samples"].items()),
        "Computed by": f"torch-fidelity {protocol['torch_fidelity']}, torch {protocol['torch']}",
        "Settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        "Parts of IS": ", ".join(f"{name} {row['isc_splits']}" for name, row in rows),
        "Subsets of KID": ", ".join(f"{name} {row['kid_subset_size']}" for name, row in rows),
    }
