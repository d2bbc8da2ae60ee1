"""Run stages of a recipe as plain functions in a folder: no Prefect, DVC or MLflow, where these are not installed.

    python -m benchmarks.stages digits-cd FOLDER teacher base student sample --set student.train.precision=fp16

A stage reads what others left in FOLDER, or in the folders that --from STAGE=FOLDER names. A training goes on from its
last saved state. Each stage's seconds, and the metrics of evaluate, are printed as JSON, a line each.
"""

import argparse
import inspect
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.common import told
from cm_core.networks import modes
from flows.monitor import Monitor
from flows.recipes.recipe import Recipe, load_recipe


class Lines(Monitor):
    """Prints what a training reports."""

    def __init__(self, stage: str) -> None:
        self._stage, self._begun = stage, time.monotonic()

    def metrics(self, values: dict[str, float], step: int) -> None:
        numbers = {key: round(value, 5) for key, value in values.items() if key != "step"}
        told({"training": self._stage, "step": step, "seconds": round(time.monotonic() - self._begun, 1), **numbers})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--from", action="extend", nargs="+", default=[], metavar="STAGE=FOLDER", dest="elsewhere")
    parts = "parts of a U-Net that compute in float32, separated by commas; empty: none"
    parser.add_argument("--float32-parts", metavar="PARTS", help=parts)
    args = parser.parse_args(argv)
    if args.float32_parts is not None:
        modes.FLOAT32_PARTS = frozenset(filter(None, args.float32_parts.split(",")))
    recipe = load_recipe(args.recipe, args.overrides, root=Path(__file__).parents[1])
    places = dict(place.split("=", 1) for place in args.elsewhere)
    for stage in args.stages:
        begun = time.monotonic()
        run(stage, recipe, args.folder, places)
        told({"stage": stage, "seconds": round(time.monotonic() - begun, 1)})
    metrics = args.folder / "evaluate" / "metrics.json"
    if "evaluate" in args.stages:
        print(metrics.read_text(), flush=True)


def run(stage: str, recipe: Recipe, folder: Path, places: dict[str, str]) -> None:
    """Call a stage with what its signature asks for, as `cm stage` does."""
    function = getattr(import_module(f"flows.stages.{stage}"), stage)
    given = {"out_dir": folder / stage, "state_dir": folder / "states" / stage, "monitor": Lines(stage)}
    for name in inspect.signature(function).parameters:
        if name not in given:
            of = name.removesuffix("_dir")
            given[name] = Path(places.get(of, folder / of)) if name.endswith("_dir") else getattr(recipe, name)
    given["out_dir"].mkdir(parents=True, exist_ok=True)
    function(**{name: given[name] for name in inspect.signature(function).parameters})


if __name__ == "__main__":
    main()
