"""Metrics by row of images, the form in which people compare them, and the keys by which MLflow has them."""

import math
import re
from collections.abc import Mapping

Metrics = Mapping[str, Mapping[str, float]]  # as in metrics.json: <metric>_<network> -> images -> value
Rows = dict[str, dict[str, float]]  # images -> metric -> value
SHOWN = {
    "fid": "FID ↓",
    "fid-min": "lowest FID ↓",
    "fid-spread": "spread of FID",
    "kid": "KID × 1000 ↓",
    "is": "IS ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
}
SCALES = {"kid": 1000.0}  # in tables only
BOUNDS = ("real", "untrained")  # rows that no training changes: in tables, not among a run's metrics
FID_OF_CALLS = re.compile(r"nfe_(\d+)/fid")
CURVES = "curves/"  # curves on a pipeline run: their last points are no results
STUDENT = "nfe_"  # rows of the student's own images begin so
OF_OLD = re.compile(r"([a-z-]+)_([^/]+)/((?:teacher_)?nfe_[^/]+|real|untrained)")  # fid_classifier/nfe_1, until 0.1


def by_row(metrics: Metrics) -> tuple[str, Rows]:
    """Return the feature network and the metrics by row: {images: {metric: value}}."""
    rows: Rows = {}
    for key, values in metrics.items():
        metric, _, network = key.partition("_")
        for name, value in values.items():
            rows.setdefault(name, {})[metric] = value
    return network, rows


def short_keys(metrics: Metrics) -> dict[str, float]:
    """Return the metrics of students and teachers by the keys of MLflow, {nfe_1/fid: value}."""
    rows = by_row(metrics)[1].items()
    return {f"{name}/{key}": value for name, row in rows if not name.startswith(BOUNDS) for key, value in row.items()}


def of_student(metrics: Metrics) -> dict[str, float]:
    """Return the metrics of the student's own images, {nfe_1/fid: value}."""
    return {key: value for key, value in short_keys(metrics).items() if key.startswith(STUDENT)}


def renamed(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the results among a run's numbers; keys that earlier versions gave them are shortened."""
    return {OF_OLD.sub(r"\3/\1", key): value for key, value in numbers.items() if not key.startswith(CURVES)}


def network_of(numbers: Mapping[str, float]) -> str | None:
    """Return the feature network that the keys of earlier versions carry; None for others."""
    return next((found[2] for key in numbers if (found := OF_OLD.fullmatch(key))), None)


def fid_against_nfe(metrics: Metrics) -> list[tuple[int, float]]:
    """Return the student's FID at its numbers of network calls, in their order."""
    found = [(FID_OF_CALLS.fullmatch(key), value) for key, value in of_student(metrics).items()]
    return sorted((int(key[1]), value) for key, value in found if key)


def fids_in_words(metrics: Metrics) -> str:
    """Return the student's FID by network calls, such as `FID 2.66 at 1 call, 2.46 at 2`."""
    shown = [f"{fid:.3g} at {nfe}" + " call" * (nfe == 1) for nfe, fid in fid_against_nfe(metrics)]
    return f"FID {', '.join(shown)}"


def four_digits(value: float) -> str:
    """Return a number of four digits, and no more than four after the point."""
    return _rounded(value, 4)


def three_digits(value: float) -> str:
    """Return a number of three digits, for sentences."""
    return _rounded(value, 3)


def _rounded(value: float, digits: int) -> str:
    whole = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(4, max(0, digits - 1 - whole))}f}"


def in_table(metric: str, value: float) -> str:
    """Return a metric's value as tables show it, KID times 1000."""
    return four_digits(value * SCALES.get(metric, 1.0))
