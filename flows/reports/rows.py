"""Results of an evaluation, as its report shows them: rows of images, their metrics and their names in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flows.data.dataset import Dataset
from flows.data.feature_files import FeatureFiles
from flows.reports.metrics_table import four_digits

MODELS = {  # in the order of the table
    "real": "Held-out images",
    "untrained": "Student before training",
    "student": "Student",
    "teacher": "Teacher",
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Neighbours:
    """Nearest training images, in feature space, of some images of a row."""

    images: np.ndarray  # int [Q], of the row
    distances: np.ndarray  # float32 [Q, K], nearest first
    training: np.ndarray  # int [Q, K], of the training images


@dataclass(frozen=True)
class Row:
    """A set of images, its origin and its metrics."""

    name: str
    model: str  # key of MODELS
    ema: int  # its weights' place in train.emas
    nfe: int | None
    sigmas: Sequence[float]
    images: np.ndarray  # uint8 [N, H, W, C], memory-mapped
    sets: int = 1  # of equal size, in which the images are measured
    metrics: Mapping[str, float] = field(default_factory=dict)
    equal: Mapping[str, float] = field(default_factory=dict)  # of as many images as the smallest row has
    neighbours: Neighbours | None = None
    width: float | None = None  # of an average rebuilt after the training (sample.widths), in place of `ema`
    guidance: float | None = None  # of rows beside those at the student's own weight (sample.guidance)

    @property
    def num_images(self) -> int:
        """Images of a set."""
        return len(self.images) // self.sets

    @property
    def without_deviations(self) -> dict[str, float]:
        """The metrics but for their standard deviations."""
        return {key: value for key, value in self.metrics.items() if not key.endswith("_std")}

    @property
    def title(self) -> str:
        """The row in words, such as `Student, one call`."""
        calls = [in_calls(self.nfe)] if self.nfe and self.model in ("student", "teacher") else []
        ema = [f"EMA {self.ema}"] if self.ema else [f"EMA of width {self.width:g}"] if self.width else []
        weight = [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        return ", ".join([MODELS[self.model], *calls, *ema, *weight])

    def by_set(self) -> list[np.ndarray]:
        """Return the images of each set."""
        return [self.images[start : start + self.num_images] for start in range(0, len(self.images), self.num_images)]


@dataclass(frozen=True)
class Artifacts:
    """Inputs of an evaluation that the report shows."""

    dataset: Dataset
    files: FeatureFiles
    samples: Mapping[str, Any]  # samples.json
    sample_dir: Path
    models: Mapping[str, Path]  # Student, Base, Teacher: their artifacts, without a model if the recipe has none
    edit_dir: Path
    edits: Mapping[str, Any]  # edit.json
    over_training: Mapping[int, Mapping[str, float]]  # steps -> row -> FID


def in_calls(nfe: int) -> str:
    """Return a number of network calls in words."""
    number = NUMBERS[nfe] if nfe < len(NUMBERS) else f"{nfe:,}"
    return f"{number} call" + "s" * (nfe != 1)


def student_title(name: str) -> str:
    """Return the name of a student's row in words: `nfe_2_at_0.8_ema1` is `two calls, σ 0.8, EMA 1`."""
    name, _, guidance = name.removeprefix("nfe_").partition("_guidance_")
    calls, _, width = name.partition("_width_")
    calls, _, ema = calls.partition("_ema")
    nfe, _, sigmas = calls.partition("_at_")
    words = [
        in_calls(int(nfe)),
        sigmas and f"σ {sigmas.replace('_', ', ')}",
        ema and f"EMA {ema}",
        width and f"EMA of width {width}",
        guidance and f"guidance {guidance}",
    ]
    return ", ".join(filter(None, words))


def of_student(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the student's first EMA that has some, at its own guidance, the fewest calls first."""
    found = [row for row in rows if row.model == "student" and row.width is None and row.guidance is None]
    first = min((row.ema for row in found), default=0)
    return sorted((row for row in found if row.ema == first), key=lambda row: row.nfe or 0)


def with_deviation(value: float, deviation: float) -> str:
    """Return `value ± deviation`, the latter of two digits; the value alone where that is 0."""
    text = four_digits(value)
    if not deviation:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {deviation:,.{decimals}f}"
