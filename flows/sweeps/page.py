"""Sweep files in params/sweeps: one recipe, and the points at which it runs.

Every point is a recipe of its own, validated before any computation; all use the same evaluation, so that the table
compares like with like.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from cm_core.params import Params
from flows.errors import UserError
from flows.recipes.files import SWEEPS_DIR, find_file
from flows.recipes.recipe import Recipe, flatten, parse_override, read_yaml, vary, yaml_text

MEASURED_ALIKE = ("data", "features", "evaluate", "sample.num_images", "sample.seed", "sample.precision")


class SweepPage(Params):
    """The contents of a sweep file: `grid` or `points`."""

    recipe: str
    """The recipe that all points start from: a name of params/recipes, or a path."""
    set: dict[str, Any] = {}
    """Values over the recipe by dotted key, the same for all points."""
    grid: dict[str, list[Any]] = {}
    """Lists of values by dotted key; every combination is a point."""
    points: dict[str, dict[str, Any]] = {}
    """Named points: values by dotted key."""
    x: str | None = None
    """A key of the grid with numbers, along which the plot runs; empty: bars."""

    @model_validator(mode="after")
    def _one_form(self) -> "SweepPage":
        if bool(self.grid) == bool(self.points):
            raise ValueError("give either grid: (lists of values by key) or points: (values by key, under names)")
        empty = [key for key, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid.{empty[0]} is an empty list")
        if self.x is not None and not all(type(value) in (int, float) for value in self.grid.get(self.x, [None])):
            raise ValueError(f"x={self.x}: must be a key of grid whose values are numbers")
        return self

    def named_values(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and the values of every point."""
        yield from self.points.items()
        if self.grid:
            for values in itertools.product(*self.grid.values()):
                point = dict(zip(self.grid, values, strict=True))
                yield describe_values(point), point


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    values: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A checked sweep, ready to run."""

    name: str
    recipe: str
    x: str | None
    points: tuple[Point, ...]


def load_sweep(name: str, overrides: Sequence[str] = (), *, root: Path) -> Sweep:
    """Read a sweep by name or path; `key=value` overrides apply to its recipe, below its points.

    Raises UserError: one line with the file, the point, the key, the value and what is allowed.
    """
    path = find_file(name, root / SWEEPS_DIR)
    page = _read_page(path)
    layers = [page.set, *(flatten(parse_override(override)) for override in overrides)]
    points = []
    for label, values in page.named_values():
        recipe = vary(page.recipe, [*layers, values], root=root, source=f"{path}: point {label}")
        points.append(Point(label, values, recipe))
    _refuse_incomparable(path, points)
    return Sweep(path.stem, page.recipe, page.x, tuple(points))


def _read_page(path: Path) -> SweepPage:
    try:
        return SweepPage.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        key, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = f"unknown key; allowed: {', '.join(SweepPage.model_fields)}"
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{reason}") from None


def _refuse_incomparable(path: Path, points: Sequence[Point]) -> None:
    """Refuse equal points, and points that are not measured alike."""
    for one, other in itertools.combinations(points, 2):
        if one.recipe == other.recipe:
            raise UserError(f"{path}: the points {one.name} and {other.name} are the same")
    first, *others = points
    for other in others:
        for key in MEASURED_ALIKE + (("seed",) if first.recipe.features.kind == "classifier" else ()):
            if attrgetter(key)(first.recipe) != attrgetter(key)(other.recipe):
                raise UserError(
                    f"{path}: the points {first.name} and {other.name} differ in {key}, which decides what the "
                    f"metrics say; all points of a sweep are measured alike"
                )


def describe_values(values: Mapping[str, Any]) -> str:
    """Return values in short form, such as `solver=heun num_scales=18`."""
    lasts = Counter(key.rpartition(".")[2] for key in values)
    words = {key: last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in values}
    return " ".join(f"{words[key]}={value_text(value)}" for key, value in values.items())


def value_text(value: Any) -> str:
    """Return a value in short form: a section's kind, a training's method, else one line of YAML."""
    if isinstance(value, Mapping) and "kind" in value:
        return str(value["kind"])
    if isinstance(value, Mapping) and "method" in value:
        return value_text(value["method"])
    return yaml_text(value)
