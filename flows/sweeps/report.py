"""Results of a sweep: one table with floor and ceiling and every point at every number of network calls; plots."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.reports.charts import save_bars, save_lines
from flows.reports.metrics_table import Metrics, Rows, by_row
from flows.sweeps.page import Point, Sweep, describe_values, value_text

TABLE_FILE = "table.csv"
ORDER = ("real", "untrained", "teacher")  # order of the calibration rows


@dataclass(frozen=True)
class Outcome:
    """A measured point."""

    point: Point
    metrics: Metrics

    @property
    def rows(self) -> Rows:
        """The metrics, {images: {metric: value}}."""
        return by_row(self.metrics)[1]

    def students(self) -> Rows:
        """The student's rows, {nfe_1: {metric: value}}."""
        return {name: row for name, row in self.rows.items() if name.startswith("nfe_")}


def calibrations(outcomes: Sequence[Outcome]) -> Rows:
    """Return the calibration rows, each once: real, untrained, the teacher's.

    If points do not share one (an untrained network may be random or the teacher, say), its name tells whose it is.
    """
    found: dict[str, Rows] = {}
    for outcome in outcomes:
        for name, row in outcome.rows.items():
            if not name.startswith("nfe_"):
                recipe = outcome.point.recipe
                start = recipe.student.initial_weights(has_base=recipe.base is not None)
                whose = f" (the {start}'s weights)" if name == "untrained" and start != "random" else ""
                same = found.setdefault(name + whose, {})
                if row not in same.values():
                    same[outcome.point.name] = row
    order = sorted(found, key=lambda label: next(i for i, word in enumerate(ORDER) if label.startswith(word)))
    return {
        label if len(found[label]) == 1 else f"{label}, {point}": row
        for label in order
        for point, row in found[label].items()
    }


def table(outcomes: Sequence[Outcome]) -> Rows:
    """Return {images: {metric: value}}: the calibrations, then every point at every number of network calls."""
    points = {f"{one.point.name}, {name}": row for one in outcomes for name, row in one.students().items()}
    return {**calibrations(outcomes), **points}


def network_of(outcomes: Sequence[Outcome]) -> str:
    """Return the feature network common to all points."""
    return by_row(outcomes[0].metrics)[0]


def write_report(sweep: Sweep, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write the table as CSV and the plots as PNG into `folder`; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(outcomes, folder / TABLE_FILE)
    plots = _plot_lines(sweep, sweep.x, outcomes, folder) if sweep.x else _plot_bars(sweep, outcomes, folder)
    return [folder / TABLE_FILE, *plots]


def write_table(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a line per row of images: its name, the point, its values, the metrics under their full names."""
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.point.values))
    metrics = list(dict.fromkeys(key for outcome in outcomes for key in outcome.metrics))
    short = {key: key.partition("_")[0] for key in metrics}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["images", "point", *keys, *metrics])
        for label, row in calibrations(outcomes).items():
            writer.writerow([label, "", *([""] * len(keys)), *(row.get(short[key], "") for key in metrics)])
        for outcome in outcomes:
            values = [value_text(outcome.point.values[key]) if key in outcome.point.values else "" for key in keys]
            for name, row in outcome.students().items():
                writer.writerow([name, outcome.point.name, *values, *(row.get(short[key], "") for key in metrics)])


def _levels(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the FID of each calibration row that all points share; a line for each point's own would hide the bars."""
    rows = calibrations(outcomes)
    kinds = {name: next(word for word in ORDER if name.startswith(word)) for name in rows}
    shared = [kind for kind, count in Counter(kinds.values()).items() if count == 1]
    return {name: row["fid"] for name, row in rows.items() if kinds[name] in shared}


def _plot_bars(sweep: Sweep, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    series: dict[str, dict[str, float]] = {}
    for outcome in outcomes:
        for name, row in outcome.students().items():
            series.setdefault(name, {})[outcome.point.name] = row["fid"]
    save_bars(
        series,
        folder / "fid.png",
        categories=[outcome.point.name for outcome in outcomes],
        xlabel=f"FID ({network_of(outcomes)})",
        title=sweep.name,
        levels=_levels(outcomes),
    )
    return [folder / "fid.png"]


def _plot_lines(sweep: Sweep, x: str, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Draw FID against the key `x`, one line per choice of the other keys, one picture per row of images."""
    pictures: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for outcome in outcomes:
        others = {key: value for key, value in outcome.point.values.items() if key != x}
        for name, row in outcome.students().items():
            line = pictures.setdefault(name, {}).setdefault(describe_values(others) or name, [])
            line.append((outcome.point.values[x], row["fid"]))
    for name, lines in pictures.items():
        save_lines(
            {label: tuple(zip(*sorted(points), strict=True)) for label, points in lines.items()},
            folder / f"fid_{name}.png",
            xlabel=x.rpartition(".")[2],
            ylabel=f"FID ({network_of(outcomes)})",
            title=f"{sweep.name}, {name}",
            markers=True,
            log_x=True,
            log_y=min(fid for points in lines.values() for _, fid in points) > 0,
            levels=_levels(outcomes),
        )
    return [folder / f"fid_{name}.png" for name in pictures]
