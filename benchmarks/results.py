"""Write what `benchmarks.points` measured: tables in Markdown, a chart of FID against minutes, a sheet of images.

python -m benchmarks.results FOLDER PICTURES     # PICTURES/fid-against-minutes.png, PICTURES/one-call.webp

The chart has the small sets of images that a training draws (student.evaluate_every), with time spent on a base before.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from PIL import Image

from flows.reports.charts import save_lines
from flows.reports.figures import GAP, save_montage
from flows.reports.metrics_table import three_digits

NUMBER = r"([\d,.e+-]+)"
COST = ("steps", "million images", "images/s", "GiB")
SHOWN = (8, 5)  # images of a row, and rows, of each point
GRID_COLUMNS = 10  # of the grids of 100 images that the stage sample writes


class Training(NamedTuple):
    """What a log says of a training."""

    steps: int
    seconds: float
    rate: float  # images/s, at its end
    memory: float  # GiB; nan on a CPU


@dataclass(frozen=True)
class Result:
    """A point's metrics by both judges, and what its log says of its trainings."""

    name: str
    metrics: dict[str, dict[str, float]]
    log: str

    @classmethod
    def read(cls, folder: Path) -> "Result":
        found = [folder / "evaluate" / "metrics.json", folder / "judge" / "evaluate" / "metrics.json"]
        metrics: dict[str, dict[str, float]] = {}
        for path in found:
            metrics |= json.loads(path.read_text()) if path.exists() else {}
        return cls(folder.name, metrics, (folder / "log.txt").read_text())

    def trained(self, stage: str) -> Training | None:
        """Return the facts of a training; None if there was none."""
        training = rf"^training {stage}, step {NUMBER}, .*images_per_s {NUMBER}(?:, .*gib {NUMBER})?$"
        lines = re.findall(training, self.log, re.M)
        seconds = re.findall(rf"^stage {stage}, seconds {NUMBER}$", self.log, re.M)
        if not lines or not seconds:
            return None
        steps, rate, memory = lines[-1]
        return Training(int(_number(steps)), _number(seconds[-1]), _number(rate), _number(memory or "nan"))

    @property
    def trainings(self) -> list[Training]:
        """The base's training, if there was one, and the student's."""
        return [found for stage in ("base", "student") if (found := self.trained(stage))]

    def quality(self, judges: Sequence[str]) -> list[str]:
        """Return the cells of the first table."""
        cells = [self.name, f"{sum(training.seconds for training in self.trainings):.0f}"]
        for key in (f"fid_{judge}" for judge in judges):
            values = [three_digits(value) for _, value in self.of_student(key)] if key in self.metrics else []
            cells.append(" / ".join(values) or "not measured")
        kinds = ("precision_classifier", "recall_classifier")
        return [*cells, ", ".join(f"{self.of_student(key)[0][1]:.2f}" for key in kinds)]

    def cost(self, batch: int) -> list[str]:
        """Return the cells of the second table; the rate is the student's."""
        steps = [training.steps for training in self.trainings]
        memory = max(training.memory for training in self.trainings)
        cells = [self.name, " + ".join(f"{count:,}" for count in steps), f"{sum(steps) * batch / 1e6:.2f}"]
        return [*cells, f"{self.trainings[-1].rate:,.0f}", f"{memory:.1f}"]

    def of_student(self, key: str) -> list[tuple[int, float]]:
        """Return (network calls, value) of the student's rows."""
        found = ((re.fullmatch(r"nfe_(\d+)", row), value) for row, value in self.metrics[key].items())
        return sorted((int(match[1]), value) for match, value in found if match)

    def curve(self) -> tuple[list[float], list[float]]:
        """Return minutes, and FID at one call of the small sets of images."""
        before = sum(training.seconds for training in self.trainings[:-1])
        clock = {_number(step): _number(seconds) for step, seconds in self._all("training student, step", "seconds")}
        points = self._all("training evaluate, step", "fid_over_training_nfe_1")
        minutes = [(before + clock[_number(step)]) / 60 for step, _ in points]
        return minutes, [_number(fid) for _, fid in points]

    def _all(self, begin: str, key: str) -> list[tuple[str, str]]:
        return re.findall(rf"^{begin} {NUMBER}, .*?{key} {NUMBER}(?:,|$)", self.log, re.M)


def _number(text: str) -> float:
    return float(text.rstrip(",").replace(",", ""))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--batch-size", type=int, default=512, help="of all trainings")
    args = parser.parse_args(argv)
    folders = sorted(path.parent.parent for path in args.folder.glob("*/evaluate/metrics.json"))
    results = sorted(map(Result.read, folders), key=lambda result: result.of_student("fid_classifier")[0][1])
    if not results:
        parser.error(f"{args.folder}: no folder of a point with evaluate/metrics.json")
    args.pictures.mkdir(parents=True, exist_ok=True)
    judges = dict.fromkeys(key.removeprefix("fid_") for result in results for key in result.metrics if "fid_" in key)
    fids = [f"FID by {judge}, 1 / 2 / 4 calls" for judge in judges]
    quality = ["method", "seconds", *fids, "precision, recall, 1 call"]
    print(_table(quality, [result.quality(list(judges)) for result in results]))
    print(_table(["method", *COST], [result.cost(args.batch_size) for result in results]))
    curves: dict[str, Any] = {result.name: curve for result in results if (curve := result.curve())[0]}
    save_lines(
        curves,
        args.pictures / "fid-against-minutes.png",
        xlabel="minutes of training",
        ylabel="FID (classifier), one call",
        title="FID against minutes",
        markers=True,
        log_y=True,
    )
    with TemporaryDirectory() as scratch:
        corners = {result.name: _corner(args.folder / result.name, Path(scratch)) for result in results}
        sheet = Path(scratch, "sheet.png")
        save_montage(corners, sheet, columns=3)
        Image.open(sheet).save(args.pictures / "one-call.webp", quality=85)  # a fifth of the PNG


def _corner(point: Path, scratch: Path) -> Path:
    """Write the first SHOWN images of the first rows of a point's grid."""
    path = scratch / f"{point.name}.png"
    with Image.open(point / "sample" / "nfe_1_grid.png") as grid:
        each = (grid.width - GAP) // GRID_COLUMNS
        width, height = (count * each + GAP for count in SHOWN)
        grid.crop((0, 0, width, height)).save(path)
    return path


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
