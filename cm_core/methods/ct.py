"""Consistency training in isolation (Song et al. 2023, arXiv 2303.01469, Algorithm 3).

Differs from the paper: mu(k) divides by N(k) - 1, as the released code; `mu_per_interval: false` is the printed form.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from cm_core.curricula import ct_num_scales, ct_target_decay
from cm_core.distances import AnyDistance, Pixelwise
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, consistency_distance, draw_eps, grid_on
from cm_core.noise import add_noise


class CT(Method):
    """Make f agree along straight noise paths, without a teacher: the same eps at t and at r."""

    kind: Literal["ct"] = "ct"
    """Name of the method."""
    s0: int = Field(2, ge=2)
    """Grid points at the start (CM, Table 3)."""
    s1: int = Field(150, ge=2)
    """Grid intervals at the end (CM, Table 3: 150, ImageNet-64 200)."""
    mu0: float = Field(0.9, gt=0, lt=1)
    """Target decay at the start (CM, Table 3: CIFAR-10 0.9, others 0.95)."""
    num_scales: int | None = Field(None, ge=2)
    """Grid points N at every step; empty: N(k), which grows from s0 to s1 + 1 (CM, Figure 3d: fixed is worse)."""
    target_decay: float | None = Field(None, ge=0, lt=1)
    """Target decay mu at every step; empty: mu(k), which follows N(k) (CM, Figure 3d)."""
    mu_per_interval: bool = True
    """Divide mu's exponent by N - 1 intervals (released code) or by N points (paper)."""
    distance: AnyDistance = Pixelwise()
    """How f(x_t, t) and its target are compared (CM, section 6.1: LPIPS is best where it applies)."""
    form: Literal["skip", "piecewise"] = "skip"
    """How the boundary f(x, sigma_min) = x is built in (CM, eq. 5 or eq. 4)."""

    @model_validator(mode="after")
    def _grows(self) -> "CT":
        if self.s1 < self.s0:
            raise ValueError(f"s1={self.s1} must be at least s0={self.s0}")
        return self

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return d(f(x0 + t eps, t), f_target(x0 + r eps, r)) on neighbours of the N(k) grid (CM, Algorithm 3)."""
        x0, num_scales = batch.x0, self.num_scales_at(context.step, context.num_steps)
        sigmas = grid_on(context.noise, num_scales, x0.device)
        i = torch.randint(num_scales - 1, (len(x0),), generator=context.generator, device=x0.device)
        t, r = sigmas[i], sigmas[i + 1]
        eps = draw_eps(x0, context.generator)
        x_t, x_r = add_noise(x0, eps, t), add_noise(x0, eps, r)
        distance = consistency_distance(models, batch, context, x_t=x_t, t=t, x_r=x_r, r=r)
        decay = self.target_decay_at(context.step, context.num_steps)
        return Loss(distance, t, {"num_scales": num_scales, "target_decay": decay})

    def num_scales_at(self, step: int, num_steps: int) -> int:
        """Return N(k), or the fixed N."""
        if self.num_scales is not None:
            return self.num_scales
        return ct_num_scales(step, num_steps=num_steps, s0=self.s0, s1=self.s1)

    def target_decay_at(self, step: int, num_steps: int) -> float:
        """Return mu(k), or the fixed mu."""
        if self.target_decay is not None:
            return self.target_decay
        num_scales = self.num_scales_at(step, num_steps)
        return ct_target_decay(num_scales, s0=self.s0, mu0=self.mu0, per_interval=self.mu_per_interval)

    @property
    def keeps_target(self) -> bool:
        """Always: the target is an EMA of its own."""
        return True
