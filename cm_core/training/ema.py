"""EMA of the weights for evaluation: constant decay, half-life in images with a ramp, power function."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from cm_core.params import Params
from cm_core.training.posthoc import WIDEST, gamma_of


class ConstantEma(Params):
    """The same decay at every step (CM, Table 3)."""

    kind: Literal["constant"] = "constant"
    """Name of the EMA."""
    decay: float = Field(0.9999, ge=0, lt=1)
    """Weight of the old average at each step (CM, Table 3)."""

    def decay_at(self, step: int, batch_size: int) -> float:
        """Return the decay used after optimiser step `step` (0-based)."""
        return self.decay


class HalfLifeEma(Params):
    """Half-life in images, shorter at the start (EDM, App. F.2)."""

    kind: Literal["half_life"] = "half_life"
    """Name of the EMA."""
    half_life_images: float = Field(500_000, gt=0)
    """Training images after which a weight's share has halved (EDM, Table 7)."""
    ramp: float | None = Field(0.05, gt=0)
    """The half-life never exceeds this share of the images seen so far; empty: no ramp (EDM, training loop)."""

    def decay_at(self, step: int, batch_size: int) -> float:
        """Return the decay used after optimiser step `step` (0-based); the very first keeps nothing old."""
        half_life = self.half_life_images
        if self.ramp is not None:
            half_life = min(half_life, self.ramp * step * batch_size)
        return 0.5 ** (batch_size / max(half_life, 1e-8))


class PowerEma(Params):
    """Power-function EMA, whose width grows with training (EDM2, 2312.02696, section 3.1)."""

    kind: Literal["power"] = "power"
    """Name of the EMA."""
    width: float = Field(0.05, gt=0, lt=WIDEST)
    """Standard deviation of the averaged steps, relative to the training's length so far (EDM2: 0.05 and 0.10)."""

    def decay_at(self, step: int, batch_size: int) -> float:
        """Return the decay used after optimiser step `step` (0-based)."""
        return (1 - 1 / (step + 1)) ** (gamma_of(self.width) + 1)


AnyEma = ConstantEma | HalfLifeEma | PowerEma


class Ema:
    """One fp32 EMA of a module's parameters. Buffers are constants and not averaged."""

    def __init__(self, rule: AnyEma, module: nn.Module) -> None:
        self.rule = rule
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, *, step: int, batch_size: int) -> None:
        """Update the EMA after optimiser step `step` (0-based)."""
        decay = self.rule.decay_at(step, batch_size)
        averages, current = list(self.weights.values()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(averages, current, 1 - decay)


def update_target(target: nn.Module, student: nn.Module, *, decay: float) -> None:
    """theta_minus <- decay * theta_minus + (1 - decay) * theta (CM, Algorithms 2 and 3)."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(student.parameters()), 1 - decay)
