"""The charts and pictures of an evaluation report, section by section."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flows.reports.charts import save_lines
from flows.reports.figures import GAP, SEPARATOR, enlarge, read_rows, save_grid, save_montage, tile
from flows.reports.metrics_table import four_digits
from flows.reports.rows import Artifacts, Neighbours, Row, in_calls, of_student, student_title

LOSS_AT = "loss_at_sigma/"  # metrics of a training's log (cm_core/training/trainer.py)
MONTAGE_GRIDS = 4  # training grids shown of a model
GRID_WIDTH = 342  # pixels: a phone's screen shows such a grid as it is, a wide one its double
GRID_ROWS, CLASS_COLUMNS = 10, 8  # narrower beside names of classes
LARGE_SIDE, LARGE_COLUMNS = 128, 4  # images from here on are not enlarged, and fewer are shown
APART = 10  # pixels between an image and its neighbours
SHORT_TITLES = {"real": "held-out images", "untrained": "before training", "student": "student", "teacher": "teacher"}
NEIGHBOURS_SHOWN = 6  # images, those that lie nearest


@dataclass(frozen=True)
class Picture:
    """A picture in the page: PNG, what stands above, below, and at its rows."""

    png: bytes
    caption: str = ""
    note: str = ""
    names: Sequence[str] = ()  # of its rows, from the top
    is_large: bool = False

    @classmethod
    def of(cls, image: Image.Image, **words: Any) -> "Picture":
        """Encode an image."""
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return cls(buffer.getvalue(), **words)

    @property
    def width(self) -> int:
        """Pixels."""
        return self._size[0]

    @property
    def height(self) -> int:
        """Pixels."""
        return self._size[1]

    @property
    def _size(self) -> tuple[int, int]:
        return Image.open(io.BytesIO(self.png)).size


@dataclass(frozen=True)
class Section:
    """A heading, and below it charts (SVG) or pictures; the template holds its explanation."""

    title: str
    charts: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # numbers in the explanation


def sections(rows: Sequence[Row], artifacts: Artifacts, plots: Path) -> list[Section]:
    """Draw the plots into the folder `plots`; return the page's sections."""
    charts = [_plot_fid(rows, artifacts, plots), *_plot_over_training(artifacts, plots)]
    charts += _plot_over("width", "relative width of the EMA", _by_width(rows), artifacts, plots)
    charts += _plot_over("guidance", "weight of guidance", _by_guidance(rows, artifacts), artifacts, plots)
    charts += _plot_losses(artifacts.models, plots)
    found = [
        Section("Samples", pictures=_sample_grids(rows, artifacts, plots)),
        Section("Curves", charts=charts),
        _show_neighbours(rows, artifacts),
        Section("Samples over training", pictures=_training_grids(artifacts.models, plots)),
        Section("Denoising", pictures=_strips(artifacts, plots)),
        Section("Editing", pictures=_edits(artifacts)),
    ]
    return [section for section in found if section.charts or section.pictures]


def _strips(artifacts: Artifacts, plots: Path) -> list[Picture]:
    """Return the denoising strips, and copy them; none of a student that knows one noise level."""
    if "strips" not in artifacts.samples:
        return []
    path = plots / "strips.png"
    path.write_bytes((artifacts.sample_dir / artifacts.samples["strips"]).read_bytes())
    return [_labelled(path)]


def _sample_grids(rows: Sequence[Row], artifacts: Artifacts, plots: Path) -> list[Picture]:
    """Return a grid of each row, the student's first; draw held-out images as a grid like those of the samples."""
    dataset, labels_file = artifacts.dataset, artifacts.samples.get("labels_file")
    labels = np.load(artifacts.sample_dir / labels_file) if labels_file else None
    order = ["student", "real", "teacher", "untrained"]
    found = []
    for row in sorted(rows, key=lambda row: (order.index(row.model), row.nfe or 0)):
        own = labels if row.model != "real" else dataset.heldout_labels
        names = dataset.class_names[:GRID_ROWS] if labels is not None else ()
        found.append(_grid(row.images, own, names, row.title))
    if len(dataset.heldout_images):
        save_grid(dataset.heldout_images[:100], plots / "real_grid.png")
    return found


def _grid(images: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str], title: str) -> Picture:
    """Return a grid of the first images: a row of each class, where the model knows classes."""
    side = enlarge(images[:1]).shape[2]
    is_large = side >= LARGE_SIDE
    columns = LARGE_COLUMNS if is_large else min(GRID_ROWS, (GRID_WIDTH - GAP) // (side + GAP))
    if not class_names or labels is None:
        shown = _tiled(images[: columns * (LARGE_COLUMNS if is_large else GRID_ROWS)], columns)
        return Picture.of(shown, caption=title, is_large=is_large)
    columns = min(columns, CLASS_COLUMNS)
    by_class = [np.nonzero(labels[: len(images)] == index)[0][:columns] for index in range(len(class_names))]
    pitch = enlarge(images[:1]).shape[1] + GAP
    canvas = Image.new("RGBA", (columns * (side + GAP) + GAP, len(by_class) * pitch + GAP), SEPARATOR)
    for index, chosen in enumerate(by_class):
        if len(chosen):  # few images may leave a class out
            canvas.paste(_tiled(images[chosen], columns), (0, index * pitch))
    return Picture.of(canvas, caption=title, names=class_names, is_large=is_large)


def _tiled(images: np.ndarray, columns: int) -> Image.Image:
    return Image.fromarray(tile(enlarge(images), columns))


def _plot_fid(rows: Sequence[Row], artifacts: Artifacts, plots: Path) -> str:
    """Write fid.csv, fid_against_nfe.csv of the student, and fid_against_nfe.png."""
    lines = [
        (row.name, row.nfe, row.metrics["fid"], row.metrics.get("fid_std"), row.num_images, row.equal.get("fid"))
        for row in rows
    ]
    _write_csv(plots / "fid.csv", ["row", "nfe", "fid", "deviation", "images", "fid_of_equal_numbers"], lines)
    curve = [(row.nfe, row.metrics["fid"]) for row in of_student(rows)]
    _write_csv(plots / "fid_against_nfe.csv", ["nfe", "fid"], curve)
    count = next((row.num_images for row in rows if row.model == "student"), None)
    curves: dict[str, list[tuple[int, float, float]]] = {}
    levels = {}
    for row in (row for row in rows if row.width is None and row.guidance is None):  # others have plots of their own
        name = SHORT_TITLES[row.model] + (f", EMA {row.ema}" if row.ema else "")
        name += f" ({row.num_images:,} images)" * (row.num_images != count)
        if row.model == "real":
            levels[name] = row.metrics["fid"]
        elif row.model != "untrained" and row.nfe is not None:  # the ceiling would hide all else
            curves.setdefault(name, []).append((row.nfe, row.metrics["fid"], row.metrics.get("fid_std", 0.0)))
    return save_lines(
        {name: tuple(zip(*sorted(points), strict=True)) for name, points in curves.items()},
        plots / "fid_against_nfe.png",
        xlabel="function evaluations (NFE) per image",
        ylabel=f"FID ({artifacts.files.short_name})",
        title="FID against network calls",
        markers=True,
        log_x=True,
        values=True,
        from_zero=True,
        levels=levels,
    )


def _by_width(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Return the rows of averages rebuilt after the training, by their width."""
    widths = {row.width for row in rows if row.width is not None}
    return {width: [row for row in rows if row.width == width and row.guidance is None] for width in widths}


def _by_guidance(rows: Sequence[Row], artifacts: Artifacts) -> dict[float, list[Row]]:
    """Return the rows of the student's first EMA by their weight of guidance, if they are of several."""
    others = {row.guidance for row in rows if row.guidance is not None}
    if not others:
        return {}
    own = of_student(rows)
    alike = [row for row in rows if row.model == "student" and row.width is None and row.ema == own[0].ema]
    found = {weight: [row for row in alike if row.guidance == weight] for weight in others}
    return {artifacts.samples["guidance"]: own, **found}


def _plot_over(
    key: str, words: str, rows: Mapping[float, Sequence[Row]], artifacts: Artifacts, plots: Path
) -> list[str]:
    """Write fid_over_KEY.csv and .png of rows by a setting, unless there are none."""
    points = sorted((row.nfe or 0, value, row.metrics["fid"]) for value, some in rows.items() for row in some)
    if not points:
        return []
    _write_csv(plots / f"fid_over_{key}.csv", ["nfe", key, "fid"], points)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for nfe, value, fid in points:
        values, fids = curves.setdefault(in_calls(nfe), ([], []))
        values.append(value)
        fids.append(fid)
    return [
        save_lines(
            curves,
            plots / f"fid_over_{key}.png",
            xlabel=words,
            ylabel=f"FID ({artifacts.files.short_name})",
            title=f"FID against the {words}",
            markers=True,
            log_x=key == "width",
            integers=False,
        )
    ]


def _show_neighbours(rows: Sequence[Row], artifacts: Artifacts) -> Section:
    """Show the images that lie nearest to training images, beside those, and held-out images alike."""
    measured = [(row, row.neighbours) for row in rows if row.neighbours is not None]
    measured.sort(key=lambda pair: pair[0].model == "real")
    pictures = [_beside_neighbours(row, found, artifacts.dataset.train_images) for row, found in measured]
    medians = {row.title: four_digits(float(np.median(found.distances[:, 0]))) for row, found in measured}
    facts: dict[str, Any] = {"medians": medians, "count": min((len(found.images) for _, found in measured), default=0)}
    if {row.model for row, _ in measured} == {"real", "student"}:
        student, real = (found.distances[:, 0] for _, found in measured)
        facts["nearer"] = float(np.mean(student < np.quantile(real, 0.01)))
    return Section("Nearest training images", pictures=pictures, facts=facts)


def _beside_neighbours(row: Row, found: Neighbours, training: np.ndarray) -> Picture:
    order = np.argsort(found.distances[:, 0], kind="stable")[:NEIGHBOURS_SHOWN]
    own = _tiled(row.images[found.images[order]], 1)
    beside = _tiled(training[found.training[order].ravel()], found.training.shape[1])
    both = Image.new("RGBA", (own.width + APART + beside.width, own.height))
    both.paste(own, (0, 0))
    both.paste(beside, (own.width + APART, 0))
    distances = [four_digits(float(found.distances[index, 0])) for index in order]
    return Picture.of(both, caption=row.title, names=distances, is_large=row.images.shape[2] >= LARGE_SIDE)


def _plot_over_training(artifacts: Artifacts, plots: Path) -> list[str]:
    """Write fid_over_training.csv and .png, if sets of images were drawn during the training."""
    points = [(row, step, fid) for step, fids in artifacts.over_training.items() for row, fid in fids.items()]
    if not points:
        return []
    _write_csv(plots / "fid_over_training.csv", ["row", "step", "fid"], points)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row, step, fid in points:
        steps, fids = curves.setdefault(student_title(row), ([], []))
        steps.append(step)
        fids.append(fid)
    return [
        save_lines(
            curves,
            plots / "fid_over_training.png",
            xlabel="step",
            ylabel=f"FID ({artifacts.files.short_name})",
            title="FID over training",
            markers=True,
            log_y=min(fid for _, _, fid in points) > 0,
        )
    ]


def _plot_losses(folders: Mapping[str, Path], plots: Path) -> list[str]:
    """Draw the loss curves of all trainings, over steps and over noise levels; skip an absent model.

    The student's curve is a table too, loss.csv, which `dvc plots diff` lays over that of other commits.
    """
    charts = []
    curves = {model: curve for model, folder in folders.items() if (curve := loss_curve(folder))}
    _write_csv(plots / "loss.csv", ["step", "loss"], list(zip(*curves.get("Student", ()), strict=True)))
    if curves:
        log_y = min(loss for _, ys in curves.values() for loss in ys) > 0
        path = plots / "loss.png"
        charts.append(save_lines(curves, path, xlabel="step", ylabel="loss", title="Loss", log_y=log_y))
    by_sigma = {model: curve for model, folder in folders.items() if (curve := _loss_by_sigma(folder))}
    if by_sigma:
        charts.append(
            save_lines(
                by_sigma,
                plots / "loss_by_sigma.png",
                xlabel="noise level sigma",
                ylabel="loss",
                title="Loss by noise level, last steps",
                markers=True,
                log_x=True,
                integers=False,
                log_y=min(loss for _, ys in by_sigma.values() for loss in ys) > 0,
            )
        )
    return charts


def _training_grids(folders: Mapping[str, Path], plots: Path) -> list[Picture]:
    grids = {name: path for model, folder in folders.items() for name, path in _some_grids(model, folder).items()}
    if grids:
        save_montage(grids, plots / "grids_over_training.png", columns=MONTAGE_GRIDS)
    return [Picture(path.read_bytes(), caption=name) for name, path in grids.items()]


def _some_grids(model: str, folder: Path) -> dict[str, Path]:
    """Pick evenly spaced grids, including the last."""
    paths = sorted((folder / "grids").glob("step_*.png"))
    count = min(MONTAGE_GRIDS, len(paths))
    chosen = [paths[(index + 1) * len(paths) // count - 1] for index in range(count)]
    return {f"{model}, step {int(path.stem.removeprefix('step_')):,}": path for path in chosen}


def _labelled(path: Path, caption: str = "", note: str = "") -> Picture:
    """Return a picture of named rows, the names apart from it."""
    names, rows = read_rows(path)
    return Picture.of(rows, caption=caption, note=note, names=names)


def _edits(artifacts: Artifacts) -> list[Picture]:
    """Show the editing gallery, one picture a task with its measured errors."""
    pictures = []
    for name, facts in artifacts.edits["tasks"].items():
        note = in_calls(facts["nfe"])
        if "rmse" in facts:
            note += f"; off by {facts['rmse']:.1f} of 255 (given: {facts['rmse_given']:.1f})"
        pictures.append(_labelled(artifacts.edit_dir / facts["picture"], name.capitalize(), note))
    return pictures


def _log_entries(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _loss_by_sigma(folder: Path) -> tuple[list[float], list[float]] | None:
    """Return the last entry of the log that has losses by noise level as a curve over them."""
    curves = ({key: value for key, value in entry.items() if key.startswith(LOSS_AT)} for entry in _log_entries(folder))
    found = [{float(key.removeprefix(LOSS_AT)): value for key, value in curve.items()} for curve in curves if curve]
    return (sorted(found[-1]), [found[-1][sigma] for sigma in sorted(found[-1])]) if found else None


def loss_curve(folder: Path) -> tuple[list[float], list[float]] | None:
    """Return the steps and losses of a training's log; None without one."""
    entries = [entry for entry in _log_entries(folder) if "loss" in entry]
    return ([entry["step"] for entry in entries], [entry["loss"] for entry in entries]) if entries else None


def _write_csv(path: Path, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)
