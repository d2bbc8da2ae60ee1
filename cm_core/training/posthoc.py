"""Averages of any width, rebuilt after the training from snapshots of a few (EDM2, 2312.02696, section 3 and App. C).

The average of relative width w after k steps weighs the weights after step s by the profile (gamma + 1) s^gamma /
k^(gamma + 1); its standard deviation is w k. Least squares fit a wanted profile by those of the snapshots.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from cm_core.checkpoint import load_tensors

WIDEST = 1 / math.sqrt(12)  # of the plain mean of all steps, gamma = 0
FOLDER, INDEX_FILE = "snapshots", "snapshots.json"  # of a model; in that folder
LARGEST_ERROR = 0.1  # of a rebuilt profile


@cache
def gamma_of(width: float) -> float:
    """Return the exponent of the profile of relative width `width`, in (0, WIDEST) (EDM2, eq. 126 and 127)."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


@dataclass(frozen=True)
class Snapshot:
    """An average of relative width `width` as it was after `step` steps."""

    step: int
    width: float

    @property
    def file(self) -> str:
        """The name of its file of tensors."""
        return f"step_{self.step:07d}-width_{self.width:g}.safetensors"


def inner_product(a: Snapshot, b: Snapshot) -> float:
    """Return the integral over time of the product of two profiles (EDM2, eq. 151)."""
    first, last = (a, b) if a.step <= b.step else (b, a)
    early, late = gamma_of(first.width), gamma_of(last.width)
    overlap = (first.step / last.step) ** late
    return (early + 1) * (late + 1) * overlap / ((early + late + 1) * last.step)


def rebuilding_weights(snapshots: Sequence[Snapshot], wanted: Snapshot) -> tuple[list[float], float]:
    """Return the weight of each snapshot in the closest approximation of `wanted`, of sum 1 (EDM2, eq. 152).

    The second number is the distance of the two profiles, relative to the norm of the wanted one.
    """
    gram = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    shared = np.array([inner_product(a, wanted) for a in snapshots])
    weights = np.linalg.solve(gram, shared)
    left = 1 - float(shared @ weights) / inner_product(wanted, wanted)
    return (weights / weights.sum()).tolist(), math.sqrt(max(left, 0.0))


def rebuild(folder: Path, width: float) -> tuple[dict[str, Tensor], float]:
    """Return the average of relative width `width` at the end of a training, float32, and its profile's error.

    Raises FileNotFoundError if `folder` holds no snapshots, ValueError for a width that they do not give.
    """
    if not 0 < width < WIDEST:
        raise ValueError(f"width {width:g}: allowed are widths above 0 and below {WIDEST:.4f}, the mean of all steps")
    snapshots = read_index(folder)
    wanted = Snapshot(max(one.step for one in snapshots), width)
    weights, error = rebuilding_weights(snapshots, wanted)
    if error > LARGEST_ERROR:
        known = ", ".join(f"{known:g}" for known in sorted({one.width for one in snapshots}))
        raise ValueError(
            f"width {width:g}: the closest average of {len(snapshots)} snapshots is {error:.0%} off; allowed: "
            f"{LARGEST_ERROR:.0%}. Widths nearer to {known}, or more snapshots (train.snapshots.count), are closer"
        )
    found: dict[str, Tensor] = {}
    for weight, one in zip(weights, snapshots, strict=True):
        for name, tensor in load_tensors(folder / one.file).items():
            part = weight * tensor.double()
            found[name] = part if name not in found else found[name].add_(part)
    return {name: tensor.float() for name, tensor in found.items()}, error


def write_index(folder: Path, snapshots: Sequence[Snapshot]) -> None:
    """Write which snapshots a folder holds."""
    (folder / INDEX_FILE).write_text(json.dumps([asdict(one) for one in snapshots], indent=1) + "\n")


def read_index(folder: Path) -> list[Snapshot]:
    """Return the snapshots of a folder; raise FileNotFoundError if it holds none."""
    return [Snapshot(**one) for one in json.loads((folder / INDEX_FILE).read_text())]
