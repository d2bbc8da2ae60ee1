"""The report of a run: that of the stage `evaluate`, which knows data and models alone, and what the run adds to it.

That is how it was made, how to make it again, and how it compares with other runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.atomic import replace_text
from flows.reports.metrics_table import SCALES, SHOWN, in_table
from flows.reports.page import render
from flows.reports.rows import student_title, with_deviation

RUN, COMPARISON, LINEAGE = "<!-- run -->", "<!-- comparison -->", "<!-- lineage -->"  # places in templates/report.html
CLEAR = 2  # standard deviations of a difference that is one


@dataclass(frozen=True)
class Measured:
    """Metrics of a student's images, and whose they are."""

    title: str
    note: str
    numbers: Mapping[str, float]  # nfe_1/fid -> value


def write_run_report(
    report: Path,
    to: Path,
    facts: Mapping[str, str],
    *,
    commands: Sequence[str] = (),
    own: Mapping[str, float] | None = None,
    deviations: Mapping[str, float] | None = None,
    others: Sequence[Measured] = (),
    lineage: str = "",
) -> None:
    """Copy a report, with facts of the run, {term: value}, commands that repeat it, and a comparison with others.

    `own` are this student's metrics, {nfe_1/fid: value}, and `deviations` their standard deviations; `lineage` is an
    SVG of what the student is made of.
    """
    lines = _compare(own or {}, deviations or {}, others)
    parts = {
        RUN: render("templates/run.html", facts=facts, commands=commands),
        COMPARISON: render("templates/comparison.html", lines=lines, others=others) if lines else "",
        LINEAGE: render("templates/lineage.html", picture=lineage) if lineage else "",
    }
    page = report.read_text(encoding="utf-8")
    for place, part in parts.items():
        page = page.replace(place, part, 1)
    to.parent.mkdir(parents=True, exist_ok=True)
    replace_text(to, page)


def _compare(
    own: Mapping[str, float], deviations: Mapping[str, float], others: Sequence[Measured]
) -> list[dict[str, Any]]:
    """Return a line of the table for each metric and number of calls that another student has, too."""
    lines = []
    shown = [key for key in own if _parts(key)[0] in SHOWN and any(key in other.numbers for other in others)]
    for key in sorted(shown, key=_order):
        metric, row = _parts(key)
        noise, scale = deviations.get(key), SCALES.get(metric, 1.0)
        cells = [_cell(metric, own[key], other.numbers.get(key), noise) for other in others]
        number = with_deviation(own[key] * scale, (noise or 0.0) * scale)
        lines.append({"metric": SHOWN[metric], "row": student_title(row), "own": number, "cells": cells})
    return lines


def _parts(key: str) -> tuple[str, str]:
    row, _, metric = key.partition("/")
    return metric, row


def _order(key: str) -> tuple[str, int]:
    metric, row = _parts(key)
    return row, list(SHOWN).index(metric)


def _cell(metric: str, own: float, other: float | None, deviation: float | None) -> dict[str, str] | None:
    """Return another student's number, and, where the noise is known, whether this one's is better; None without."""
    if other is None:
        return None
    number = in_table(metric, other)
    if deviation is None:
        return {"value": number, "verdict": ""}
    if abs(own - other) <= CLEAR * math.sqrt(2) * deviation:  # a difference deviates by the root of 2 more
        return {"value": number, "verdict": "alike"}
    return {"value": number, "verdict": "better" if (own < other) == ("↓" in SHOWN[metric]) else "worse"}
