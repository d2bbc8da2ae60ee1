"""Run points of a sweep on the cards of one machine, as plain stages where Prefect, DVC and MLflow are missing.

    python -m benchmarks.points cifar10-methods FOLDER --devices 0 1 2 3 --points ect dmd2 --set data.source=...

The first device makes what the points share: prepare, features, the teacher. Then each device takes a point, trains,
samples and measures it, and takes the next: two trainings on one card are slower than one after the other. A point's
output is FOLDER/<point>/log.txt. The same command goes on where it stopped. Each point's seconds and metrics are
printed as JSON as it ends; the exit code is 1 if one failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from flows.recipes.recipe import dump_recipe
from flows.sweeps.page import Point, load_sweep

ROOT = Path(__file__).parents[1]
SHARED = ("prepare", "features", "teacher")
OWN = ("base", "student", "sample", "edit", "evaluate")
OF_TEACHER = ("seed", "conditional", "data", "noise", "network", "teacher")  # sections that its stage reads


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", nargs="+", default=["0"], help="as in CUDA_VISIBLE_DEVICES")
    parser.add_argument("--points", nargs="+", help="names of points, in the order of need; default: all")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args(argv)
    points = {point.name: point for point in load_sweep(args.sweep, args.overrides, root=ROOT).points}
    unknown = [name for name in args.points or () if name not in points]
    if unknown:
        parser.error(f"no point {unknown[0]} in {args.sweep}; there are {', '.join(points)}")
    chosen = [points[name] for name in args.points or points]
    with_teacher = next((point for point in chosen if point.recipe.teacher is not None), chosen[0])
    shared = args.folder / "shared"
    if run(shared, with_teacher, SHARED, {}, args.devices[0]) != 0:
        sys.exit(f"{shared / 'log.txt'}: what the points share failed")
    if not all(run_points(chosen, with_teacher, args.folder, args.devices)):
        sys.exit(1)


def run_points(points: Sequence[Point], with_teacher: Point, folder: Path, devices: Sequence[str]) -> list[bool]:
    """Let each device run the next point until there is none; return whether each succeeded."""
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)

    def on_a_free_device(point: Point) -> bool:
        device = free.get()
        try:
            return run_point(point, with_teacher, folder, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        return list(pool.map(on_a_free_device, points))


def run_point(point: Point, with_teacher: Point, folder: Path, device: str) -> bool:
    """Run what is a point's own, print its metrics, return whether it succeeded."""
    shared, begun = folder / "shared", time.monotonic()
    places = {stage: shared / stage for stage in SHARED}
    stages: tuple[str, ...] = OWN
    if any(getattr(point.recipe, key) != getattr(with_teacher.recipe, key) for key in OF_TEACHER):
        del places["teacher"]
        stages = ("teacher", *OWN)
    code = run(folder / point.name, point, stages, places, device)
    told: dict[str, Any] = {"point": point.name, "device": device, "seconds": round(time.monotonic() - begun, 1)}
    told |= json.loads((folder / point.name / "evaluate" / "metrics.json").read_text()) if code == 0 else {"code": code}
    print(json.dumps(told), flush=True)
    return code == 0


def run(folder: Path, point: Point, stages: Sequence[str], places: Mapping[str, Path], device: str) -> int:
    """Run those stages of a point that are not done, in a process that sees one device; return its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, done = folder / "recipe.yaml", folder / "done.yaml"
    recipe.write_text(dump_recipe(point.recipe))
    if done.exists() and done.read_text() == recipe.read_text():
        return 0
    elsewhere = ["--from", *(f"{stage}={place}" for stage, place in places.items())] if places else []
    command = [sys.executable, "-m", "benchmarks.stages", str(recipe), str(folder), *stages, *elsewhere]
    with (folder / "log.txt").open("a") as log:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code == 0:
        done.write_text(recipe.read_text())
    return code


if __name__ == "__main__":
    main()
