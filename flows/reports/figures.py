"""Image grids (PIL) and line plots (matplotlib), written as deterministic PNG bytes.

Images are uint8 [N, H, W, C] with C = 1 or 3, as every artifact of the pipeline stores them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEPARATOR = 255  # white between tiles
GAP = 2  # pixels between tiles, after upscaling
MIN_SIDE = 32  # pixels of the shorter side of a tile, at least
MARGIN, CAPTION = 14, 32  # pixels to the right of and above a picture of a montage
INK = "#222222"
PALETTE = ("#2f5fb3", "#d1622b", "#2d8a57", "#8a4fa8", "#b3892f", "#4a4a4a")
SERIES_STYLE: dict[str, Any] = {"linewidth": 1.6, "markersize": 6}


def save_grid(images: np.ndarray, path: Path, *, columns: int | None = None) -> None:
    """Write `images` [N, H, W, C] as one picture in rows of `columns`, by default as square as possible.

    Small images are enlarged by a whole factor. Raises ValueError for no images, or not uint8 [N, H, W, 1 or 3].
    """
    _check_images(images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    Image.fromarray(tile(enlarge(images), columns)).save(path, format="PNG")


def save_rows(rows: Mapping[str, np.ndarray], path: Path) -> None:
    """Write one named row of tiles per entry, e.g. the steps of a sampler.

    Raises ValueError for no rows, or a row that is not uint8 [N, H, W, 1 or 3].
    """
    if not rows:
        raise ValueError("rows is empty: at least one row of images is needed")
    for images in rows.values():
        _check_images(images)
    strips = {name: tile(enlarge(images), len(images)) for name, images in rows.items()}
    font = ImageFont.load_default(size=14)
    margin = max(math.ceil(font.getlength(name)) for name in strips) + 12
    width = margin + max(strip.shape[1] for strip in strips.values())
    canvas = Image.new("RGB", (width, sum(strip.shape[0] for strip in strips.values())), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for name, strip in strips.items():
        pen.text((6, top + strip.shape[0] // 2), name, font=font, fill=INK, anchor="lm")
        canvas.paste(Image.fromarray(strip), (margin, top))
        top += strip.shape[0]
    canvas.save(path, format="PNG")


def save_montage(pictures: Mapping[str, Path], path: Path, *, columns: int, min_width: int = 260) -> None:
    """Lay out pictures in rows of `columns`, each under its name; narrow ones are enlarged by a whole factor.

    Raises ValueError without pictures.
    """
    if not pictures:
        raise ValueError("pictures is empty: at least one picture is needed")
    opened = {name: _at_least(_open_rgb(file), min_width) for name, file in pictures.items()}
    width = max(picture.width for picture in opened.values()) + MARGIN
    height = max(picture.height for picture in opened.values()) + CAPTION
    columns = min(columns, len(opened))
    canvas = Image.new("RGB", (columns * width, math.ceil(len(opened) / columns) * height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for index, (name, picture) in enumerate(opened.items()):
        left, top = (index % columns) * width, (index // columns) * height
        pen.text((left + GAP, top + CAPTION - 6), name, font=font, fill=INK, anchor="ls")
        canvas.paste(picture, (left, top + CAPTION))
    canvas.save(path, format="PNG")


def _open_rgb(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _at_least(picture: Image.Image, width: int) -> Image.Image:
    factor = max(1, math.ceil(width / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def enlarge(images: np.ndarray) -> np.ndarray:
    """Repeat pixels by the smallest whole factor that makes the shorter side at least MIN_SIDE."""
    factor = max(1, math.ceil(MIN_SIDE / min(images.shape[1:3])))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Lay `images` [N, H, W, C] out in rows of `columns`; return RGB uint8 with thin separators."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3)
    canvas = np.full(shape, SEPARATOR, dtype=np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
        canvas[top : top + height, left : left + width] = image  # grey broadcasts to RGB
    return canvas


def save_lines(
    series: Mapping[str, Sequence[Sequence[float]]],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str,
    markers: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Plot named series of (x, y) points, and `levels` as dashed horizontal lines, into one PNG."""
    figure, axes = _figure(4, xlabel=xlabel, ylabel=ylabel, title=title)
    axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    for (name, (x, y)), colour in zip(series.items(), _colours(len(series)), strict=True):
        axes.plot(x, y, label=name, color=colour, marker="o" if markers else None, **SERIES_STYLE)
    for (name, value), dashes in zip((levels or {}).items(), _dash_patterns(len(levels or {})), strict=True):
        axes.axhline(value, label=name, color="#777777", linewidth=1.2, linestyle=dashes)
    if log_x:
        _mark_integers(axes, [x for xs, _ in series.values() for x in xs])
    axes.grid(alpha=0.25)
    _save_figure(figure, path)


def save_bars(
    series: Mapping[str, Mapping[str, float]],
    path: Path,
    *,
    categories: Sequence[str],
    xlabel: str,
    title: str,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Plot {series: {category: value}} as grouped horizontal bars, and `levels` as dashed lines, into one PNG.

    The scale is logarithmic if all values are positive.
    """
    figure, axes = _figure(1.6 + 0.22 * len(categories) * (len(series) + 1), xlabel=xlabel, title=title)
    height = 1 / (len(series) + 1)
    for index, ((name, values), colour) in enumerate(zip(series.items(), _colours(len(series)), strict=True)):
        places = [categories.index(category) + index * height for category in values]
        bars = axes.barh(places, list(values.values()), height, label=name, color=colour)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    for (name, value), dashes in zip((levels or {}).items(), _dash_patterns(len(levels or {})), strict=True):
        axes.axvline(value, label=name, color="#777777", linewidth=1.2, linestyle=dashes)
    everything = [*(value for values in series.values() for value in values.values()), *(levels or {}).values()]
    axes.set_xscale("log" if min(everything) > 0 else "linear")
    axes.set_yticks([place + height * (len(series) - 1) / 2 for place in range(len(categories))], categories)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    _save_figure(figure, path)


def _figure(height: float, **labels: str) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: its global state is not safe when two stages draw concurrently.
    figure = Figure(figsize=(7, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save_figure(figure: "Figure", path: Path) -> None:
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None})  # a version string would change the bytes


def _mark_integers(axes: "Axes", values: Sequence[float]) -> None:
    """Label exactly the values that occur: decades are too coarse for 1, 2 and 35 network calls."""
    ticks = sorted(set(values))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _colours(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _dash_patterns(count: int) -> list[tuple[int, tuple[int, int]]]:
    """Return a growing dash for each level, so that levels of one colour stay apart."""
    return [(0, (2 + 3 * index, 2)) for index in range(count)]


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be uint8 [N, H, W, 1 or 3] with N > 0, got {images.dtype} {list(images.shape)}")
