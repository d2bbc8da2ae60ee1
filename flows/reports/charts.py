"""Line plots and bars (matplotlib): deterministic PNG bytes, and SVG in the colours of the page around it."""

import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1d2430", "#5c6675", "#dfe3ea"
PALETTE = ("#2f5fb3", "#c4551f", "#24784a", "#8a4fa8", "#8f6a14", "#4a4a4a")
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line"} | {hue: f"series-{i}" for i, hue in enumerate(PALETTE, 1)}
SERIES_STYLE: dict[str, Any] = {"linewidth": 1.8, "markersize": 5.5, "capsize": 3}
ONE_AT_A_TIME = threading.Lock()
STYLE: Any = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": LINE,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


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
    integers: bool = True,
    values: bool = False,
    from_zero: bool = False,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Plot named series of (x, y) or (x, y, deviation), and `levels` as dashed lines, into one PNG; return it as SVG.

    A logarithmic x axis labels exactly the `integers` that occur; `values` writes y beside each point.
    """
    with _style():
        figure, axes = _figure(3.3, xlabel=xlabel, ylabel=ylabel, title=title)
        axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        looks = cycle(product((("-", "o"), ("--", "s")), PALETTE))
        for (name, (x, y, *spread)), ((line, marker), colour) in zip(series.items(), looks, strict=False):
            look: dict[str, Any] = {"color": colour, "linestyle": line, "marker": marker if markers else None}
            axes.errorbar(x, y, yerr=spread[0] if spread else None, label=name, **look, **SERIES_STYLE)
            for point in zip(x, y, strict=True) if values else ():
                axes.annotate(f"{point[1]:#.3g}", point, (5, 6), textcoords="offset points", fontsize="small")
        _draw_levels(axes.axhline, levels or {})
        if log_x and integers:  # decades are too coarse for 1, 2 and 35 network calls
            ticks = sorted({x for xs, *_ in series.values() for x in xs})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.08)
        axes.grid()
        axes.set_axisbelow(True)
        return _save_figure(figure, path)


def save_bars(
    series: Mapping[str, Mapping[str, float]],
    path: Path,
    *,
    categories: Sequence[str],
    xlabel: str,
    title: str,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Plot {series: {category: value}} as grouped horizontal bars, `levels` as dashed lines, as `save_lines` does.

    The scale is logarithmic if all values are positive.
    """
    with _style():
        figure, axes = _figure(1.6 + 0.2 * len(categories) * (len(series) + 1), xlabel=xlabel, title=title)
        height = 1 / (len(series) + 1)
        for index, ((name, values), colour) in enumerate(zip(series.items(), cycle(PALETTE), strict=False)):
            places = [categories.index(category) + index * height for category in values]
            bars = axes.barh(places, list(values.values()), height, label=name, color=colour)
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        _draw_levels(axes.axvline, levels or {})
        everything = [*(value for values in series.values() for value in values.values()), *(levels or {}).values()]
        axes.set_xscale("log" if min(everything) > 0 else "linear")
        axes.set_yticks([place + height * (len(series) - 1) / 2 for place in range(len(categories))], categories)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        return _save_figure(figure, path)


@contextmanager
def _style() -> Iterator[None]:
    """Draw in this style; it is matplotlib's global state, so one figure at a time."""
    from matplotlib import rc_context

    with ONE_AT_A_TIME, rc_context(STYLE):
        yield


def _figure(height: float, **labels: str) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot, which would keep every figure.
    figure = Figure(figsize=(5, height), dpi=180, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot(**labels)


def _save_figure(figure: "Figure", path: Path) -> str:
    axes = figure.axes[0]
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, format="png", metadata={"Software": None})  # a version string would change the bytes
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_a_page(drawn.getvalue(), axes.get_title(loc="left"))


def _for_a_page(svg: str, name: str) -> str:
    """Return an SVG file as an element of an HTML page, in the page's font and variables of colour."""
    from html import escape

    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{escape(name)}"', svg)
    for colour, variable in VARIABLES.items():
        svg = re.sub(rf"(?<=: ){colour}\b", f"var(--{variable})", svg)
    return svg


def _draw_levels(draw: Callable[..., Any], levels: Mapping[str, float]) -> None:
    """Draw each level as a line of its own dash, so that levels of one colour stay apart."""
    for index, (name, value) in enumerate(levels.items()):
        draw(value, label=name, color=SOFT, linewidth=1.2, linestyle=(0, (2 + 3 * index, 2)))
