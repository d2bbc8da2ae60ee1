"""Run points of a sweep on the cards of one machine, as plain stages where Prefect, DVC and MLflow are missing.

    python -m benchmarks.points cifar10-methods FOLDER --devices 0 1 2 3 --points ect dmd2 --set data.source=...

The teacher and the feature network, which the points share, are made first. Then each device trains a point, draws its
images, and takes the next: two trainings on one card are slower than one after the other. Points that need no teacher
are trained beside it, if they are named first. Images are measured beside the next training, and once more by a second
feature network if --judge has its settings: --judge features.architecture=convmixer. A point's output is
FOLDER/<point>/log.txt. The same command goes on where it stopped. Each point's seconds of training and drawing, and its
metrics, are printed as JSON as it ends; the exit code is 1 if one failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from flows.recipes.recipe import Recipe, dump_recipe
from flows.sweeps.page import Point, load_sweep

ROOT = Path(__file__).parents[1]
TRAINED = ("base", "student", "sample")
MEASURED = ("edit", "evaluate")
OF_TEACHER = ("seed", "conditional", "data", "noise", "network", "teacher")  # sections that its stage reads


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", nargs="+", default=["0"], help="as in CUDA_VISIBLE_DEVICES")
    parser.add_argument("--points", nargs="+", help="names of points, in the order of need; default: all")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--judge", nargs="+", default=[], metavar="KEY=VALUE", help="over --set, to measure once more")
    args = parser.parse_args(argv)
    points, judged = (
        {point.name: point for point in load_sweep(args.sweep, overrides, root=ROOT).points}
        for overrides in (args.overrides, args.overrides + args.judge)
    )
    unknown = [name for name in args.points or () if name not in points]
    if unknown:
        parser.error(f"no point {unknown[0]} in {args.sweep}; there are {', '.join(points)}")
    chosen = [points[name] for name in args.points or points]
    machine = Machine(args.folder, args.devices, chosen, list(points.values()))
    if not machine.prepare():
        sys.exit(f"{machine.shared / 'log.txt'}: what the points share failed")
    if not all(machine.run(judged if args.judge else {})):
        sys.exit(1)


class Machine:
    """Devices that run points of a sweep, and a folder for each point and for what they share."""

    def __init__(self, folder: Path, devices: Sequence[str], points: Sequence[Point], every: Sequence[Point]) -> None:
        self.folder, self.shared, self.points = folder, folder / "shared", points
        self.first = next((point for point in every if point.recipe.teacher is not None), every[0])  # whatever runs now
        self.devices, self.free = devices, SimpleQueue[str]()
        for device in devices:
            self.free.put(device)

    @contextmanager
    def device(self) -> Iterator[str]:
        """Wait for a device that is free, and keep others from it."""
        device = self.free.get()
        try:
            yield device
        finally:
            self.free.put(device)

    def prepare(self) -> bool:
        """Prepare the data; return whether it succeeded."""
        return stages(self.shared, self.first.recipe, ["prepare"], {}, self.devices[0]) == 0

    def run(self, judged: Mapping[str, Point]) -> list[bool]:
        """Make what the points share, run them all, and print their metrics; return whether each succeeded."""
        with ThreadPoolExecutor(len(self.devices)) as devices, ThreadPoolExecutor(len(self.devices)) as beside:
            teacher = devices.submit(self.share, self.shared, self.first.recipe, "teacher")
            features = [devices.submit(self.share, self.shared, self.first.recipe, "features")]
            beside_teacher = len(self.devices) - 1
            trained = [devices.submit(self.train, point, teacher) for point in self.points[:beside_teacher]]
            if judged:  # needed last, so trained when the teacher leaves its device
                second = judged[self.first.name].recipe
                features.append(devices.submit(self.share, self.shared / "judge", second, "features"))
            trained += [devices.submit(self.train, point, teacher) for point in self.points[beside_teacher:]]
            measured = [
                beside.submit(self.measure, point, judged.get(point.name), training, features)
                for point, training in zip(self.points, trained, strict=True)
            ]
            return [future.result() for future in measured]

    def needs_teacher(self, point: Point) -> bool:
        """Whether the training or the drawing waits for the teacher that points share."""
        recipe = point.recipe
        trainings = [recipe.student] + ([recipe.base] if recipe.base else [])
        used = any(training.uses_teacher(has_base=False) for training in trainings) or recipe.sample.teacher_images != 0
        return used and not self.has_own_teacher(point)

    def has_own_teacher(self, point: Point) -> bool:
        """Whether a section that the teacher's stage reads differs from those of the shared one."""
        return any(getattr(point.recipe, key) != getattr(self.first.recipe, key) for key in OF_TEACHER)

    def share(self, folder: Path, recipe: Recipe, stage: str) -> int:
        """Run a stage whose output the points share."""
        with self.device() as device:
            return stages(folder, recipe, [stage], {"prepare": self.shared / "prepare"}, device)

    def train(self, point: Point, teacher: "Future[int]") -> tuple[int, str, float]:
        """Train a point and draw its images; return the exit code, the device and the seconds."""
        if self.needs_teacher(point) and (code := teacher.result()) != 0:
            return code, "", 0.0
        own = self.has_own_teacher(point)
        with self.device() as device:
            begun = time.monotonic()
            code = stages(
                self.folder / point.name,
                point.recipe,
                ["teacher", *TRAINED] if own else TRAINED,
                {name: self.shared / name for name in (["prepare"] if own else ["prepare", "teacher"])},
                device,
            )
            return code, device, round(time.monotonic() - begun, 1)

    def measure(
        self,
        point: Point,
        judged: Point | None,
        training: "Future[tuple[int, str, float]]",
        features: Sequence["Future[int]"],
    ) -> bool:
        """Measure the images of a point, by the second feature network too; print and return whether all succeeded."""
        code, device, seconds = training.result()
        told: dict[str, Any] = {"point": point.name, "device": device, "seconds": seconds}
        judges = [(self.folder / point.name, point, self.shared)]
        if judged:
            judges.append((self.folder / point.name / "judge", judged, self.shared / "judge"))
        for (folder, measured, of), future in zip(judges, features, strict=True):
            code = code or future.result() or self.evaluate(folder, measured, of / "features", device)
            if code == 0:
                told |= json.loads((folder / "evaluate" / "metrics.json").read_text())
        print(json.dumps(told if code == 0 else {**told, "code": code}), flush=True)
        return code == 0

    def evaluate(self, folder: Path, point: Point, features: Path, device: str) -> int:
        """Measure the images of a point by a feature network, in `folder`; return the exit code."""
        own = self.folder / point.name
        places = {name: own / name for name in TRAINED} | {"prepare": self.shared / "prepare", "features": features}
        places["teacher"] = (own if self.has_own_teacher(point) else self.shared) / "teacher"
        return stages(folder, point.recipe, MEASURED, places, device)


def stages(folder: Path, recipe: Recipe, names: Sequence[str], places: Mapping[str, Path], device: str) -> int:
    """Run stages unless they are done, in a process that sees one device; return its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    text, file, done = dump_recipe(recipe), folder / "recipe.yaml", folder / f"{names[-1]}.done.yaml"
    if done.exists() and done.read_text() == text:
        return 0
    file.write_text(text)
    elsewhere = ["--from", *(f"{stage}={place}" for stage, place in places.items())] if places else []
    command = [sys.executable, "-m", "benchmarks.stages", str(file), str(folder), *names, *elsewhere]
    with (folder / "log.txt").open("a") as log:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code == 0:
        done.write_text(text)
    return code


if __name__ == "__main__":
    main()
