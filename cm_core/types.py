"""Types passed around in a training step: a batch, the networks, the position in the training, the losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cm_core.noise import Noise
from cm_core.precond import Precond


class Batch(NamedTuple):
    """A training batch on the device."""

    x0: Tensor  # [B, C, H, W] float32 in -1..1
    labels: Tensor | None  # [B] int64, -1 for none; None for unconditional networks


@dataclass(frozen=True)
class Models:
    """The networks of one training step. Only the student and the weighting get gradients."""

    student: Precond
    target: Precond  # the student itself if the method keeps no EMA
    teacher: Precond | None = None
    distance: Callable[[Tensor, Tensor], Tensor] | None = None
    weighting: nn.Module | None = None  # sigma [B] -> log-weight [B], learned with the student


@dataclass(frozen=True)
class StepContext:
    """The position of a step in the training, and its randomness."""

    step: int
    num_steps: int
    noise: Noise
    generator: torch.Generator  # on the batch's device; draws times and noise


class Loss(NamedTuple):
    """Weighted losses and extra values to log."""

    per_sample: Tensor  # [B]
    sigma: Tensor  # [B], each sample's (larger) noise level
    scalars: Mapping[str, float] = {}
