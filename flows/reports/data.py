"""The data report: counts, sizes, duplicates, leaks and extremes of a prepared data set, as JSON and as one HTML page.

The bytes are deterministic: later stages depend on the folder.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flows.data.images import PREVIEW_CLASSES, TRAITS, preview_grid
from flows.data.survey import Measured, Pairs, Pixels, find_duplicates, measure
from flows.monitor import Monitor
from flows.reports.figures import save_rows
from flows.reports.page import write_page

TEMPLATE = "templates/data.html"
REPORT_FILE, PAGE_FILE = "report.json", "report.html"
NAMED = 100  # names in a list
SHOWN = 8  # images in a row
SHEET_CLASSES = 40
UNEVEN = 10  # times as many images in the largest class as in the smallest
DIFFERENT = 0.05  # total variation distance between the classes of both splits
UNIFORM_STD = 2.0  # grey levels; an image of less is called uniform


def write_data_report(
    out_dir: Path,
    facts: Mapping[str, Any],
    ignored: Sequence[str],
    names: Sequence[str],
    originals: Mapping[str, Counter[str]],
    monitor: Monitor,
) -> None:
    """Measure the arrays of a prepared data set and write preview.png, report.json, report.html and their pictures.

    `facts` go into dataset.json, `names` are those of all images, training images first, and `originals` count the
    images before their conversion by size and by mode.
    """
    parts = {split: np.load(out_dir / f"{split}_images.npy", mmap_mode="r") for split in ("train", "heldout")}
    labels = [np.load(out_dir / f"{split}_labels.npy") for split in parts]
    pixels = Pixels(*parts.values())
    measured = measure(pixels, lambda done: monitor.progress(done, len(pixels), "images measured"))
    pairs = find_duplicates(pixels, measured)
    classes = _count_classes(facts["class_names"], *labels)
    extremes = _extremes(measured)
    report = {
        "name": facts["name"],
        "source": facts["source"],
        "images": {split: len(images) for split, images in parts.items()},
        "classes": classes,
        "label_gaps": list(facts["label_gaps"]),
        "originals": {key: dict(found.most_common(NAMED)) for key, found in originals.items()},
        "conversions": {key: count for key, count in facts["counts"].items() if key in TRAITS and count},
        "skipped": _listed(facts["skipped"]),
        "ignored": _listed(ignored),
        "unused_splits": dict(facts["unused_splits"]),
        "duplicates": _duplicates(pairs, pixels.num_train, names, np.concatenate(labels)),
        "extremes": {kind: [names[index] for index in indices] for kind, indices in extremes.items()},
        "uniform_images": int((measured.deviation < UNIFORM_STD).sum()),
    }
    report["findings"] = _findings(report)
    (out_dir / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    for finding in report["findings"]:
        monitor.remark(finding)
    pictures = _draw(out_dir, parts["train"], labels[0], facts["class_names"], pixels, extremes, pairs)
    columns = ("train", "heldout", "leaks", "labelled_otherwise")
    same = [[kind, *(report["duplicates"][kind][column] for column in columns)] for kind in ("exact", "near")]
    tables = {"class_rows": [list(one.values()) for one in classes], "duplicate_rows": same}
    write_page(out_dir / PAGE_FILE, TEMPLATE, report=report, pictures=pictures, **tables)


def _count_classes(names: Sequence[str], train: np.ndarray, heldout: np.ndarray) -> list[dict[str, Any]]:
    counts = [np.bincount(labels[labels >= 0], minlength=len(names)).tolist() for labels in (train, heldout)]
    return [{"name": name, "train": a, "heldout": b} for name, a, b in zip(names, *counts, strict=True)]


def _listed(names: Sequence[str]) -> dict[str, Any]:
    return {"count": len(names), "names": list(names[:NAMED])}


def _extremes(measured: Measured) -> dict[str, np.ndarray]:
    orders = {"darkest": measured.mean, "brightest": -measured.mean, "most uniform": measured.deviation}
    return {kind: np.argsort(values, kind="stable")[:SHOWN] for kind, values in orders.items()}


def _duplicates(pairs: Pairs, num_train: int, names: Sequence[str], labels: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, both in pairs._asdict().items():
        later_in_train, earlier_in_train = both[:, 1] < num_train, both[:, 0] < num_train
        leaks = both[earlier_in_train & ~later_in_train]
        found[kind] = {
            "train": int(later_in_train.sum()),
            "heldout": int((~earlier_in_train).sum()),
            "found": len(both),
            "leaks": len(leaks),
            "labelled_otherwise": int((labels[both[:, 0]] != labels[both[:, 1]]).sum()),
            "leaked": [[names[a], names[b]] for a, b in leaks[:NAMED]],
            "pairs": [[names[a], names[b]] for a, b in both[:NAMED]],
        }
    return found


def _findings(report: Mapping[str, Any]) -> list[str]:
    """Return what a person should know before training, a sentence each."""
    found, images, same = [], report["images"], report["duplicates"]
    for kind in ("exact", "near"):
        one = same[kind]
        if one["leaks"]:
            first = " and ".join(one["leaked"][0])
            found.append(
                f"leak: {one['leaks']} of {images['heldout']} held-out images are {kind} duplicates of training images"
                f" (first: {first}); metrics on held-out images are too good"
            )
        if one["train"]:
            found.append(f"{one['train']} training images are {kind} duplicates of earlier ones")
        if one["labelled_otherwise"]:
            found.append(
                f"{one['labelled_otherwise']} {kind} duplicates are labelled otherwise than the image they repeat"
            )
    if count := report["skipped"]["count"]:
        found.append(f"{count} images cannot be used and are left out (first: {report['skipped']['names'][0]})")
    found += [f"{count} images of {split} are not used" for split, count in report["unused_splits"].items()]
    if report["label_gaps"]:
        gaps = ", ".join(map(str, report["label_gaps"][:10])) + (", ..." if len(report["label_gaps"]) > 10 else "")
        found.append(f"no training image has a label among {gaps}; the classes are numbered without them")
    if count := report["uniform_images"]:
        found.append(f"{count} images are of one colour, or nearly so")
    return found + _class_findings(report["classes"])


def _class_findings(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    if not classes:
        return []
    found = [f"class {one['name']} has no training image" for one in classes if not one["train"]]
    train, heldout = (np.array([one[split] for one in classes], float) for split in ("train", "heldout"))
    low, high = classes[int(train.argmin())], classes[int(train.argmax())]
    if low["train"] and high["train"] >= UNEVEN * low["train"]:
        found.append(
            f"classes are uneven: {high['train']} training images of {high['name']}, {low['train']} of {low['name']};"
            " metrics of samples drawn with sample.labels=uniform would measure that as well"
        )
    if train.sum() and heldout.sum():
        distance = float(np.abs(train / train.sum() - heldout / heldout.sum()).sum() / 2)
        if distance > DIFFERENT and heldout.sum() >= len(classes) / DIFFERENT:
            found.append(
                f"held-out images have other proportions of classes: {distance:.0%} would have to change class; metrics"
                " of real images, the floor, are moved by that"
            )
    return found


def _draw(
    out_dir: Path,
    train: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    pixels: Pixels,
    extremes: Mapping[str, np.ndarray],
    pairs: Pairs,
) -> dict[str, Path]:
    """Draw the page's pictures; return {heading: file}."""
    sheet = out_dir / ("sheet.png" if len(class_names) > PREVIEW_CLASSES else "preview.png")
    pictures = {"Samples by class" if class_names else "Samples": sheet}
    preview_grid(train, labels, tuple(class_names)).save(out_dir / "preview.png")
    if sheet.name != "preview.png":
        preview_grid(train, labels, tuple(class_names), rows=SHEET_CLASSES).save(sheet)
    shown = {kind: pixels.take(indices) for kind, indices in extremes.items()}
    save_rows(shown, pictures.setdefault("Extremes", out_dir / "extremes.png"))
    alike = np.concatenate([pairs.exact[:SHOWN], pairs.near[:SHOWN]])
    alike = alike[np.argsort(alike[:, 1] < pixels.num_train, kind="stable")][:SHOWN]  # leaks first
    if len(alike):
        rows = {"earlier": pixels.take(alike[:, 0]), "later": pixels.take(alike[:, 1])}
        save_rows(rows, pictures.setdefault("Duplicates side by side", out_dir / "duplicates.png"))
    return pictures
