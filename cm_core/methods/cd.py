"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, Algorithm 2).

Differs from the paper: nothing. The weight lambda is 1, and l1 and l2 are means over the sample, as in its code.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from cm_core.distances import AnyDistance, Pixelwise
from cm_core.guidance import WeightRange
from cm_core.methods.base import (
    Batch,
    Loss,
    Method,
    Models,
    StepContext,
    consistency_distance,
    draw_eps,
    grid_on,
    teacher_of,
)
from cm_core.noise import add_noise
from cm_core.solvers import STEPS


class CD(Method):
    """Make f agree along the teacher's trajectories: one solver step from t to r, f(x_t, t) pulled to f(x_r, r)."""

    starts_from: ClassVar[Literal["teacher", "random"]] = "teacher"

    kind: Literal["cd"] = "cd"
    """Name of the method."""
    num_scales: int = Field(18, ge=2)
    """Grid points N (CM, section 6.1: 18 on CIFAR-10, 40 on larger images)."""
    solver: Literal["euler", "heun"] = "heun"
    """The teacher's step from t to r (CM, section 6.1)."""
    guidance: float = Field(1.0, ge=0)
    """Weight of the label in the teacher's classifier-free guidance, distilled with it; 1: none (2207.12598)."""
    guidance_range: WeightRange | None = None
    """Range of that weight as an input of the student, drawn for each image; `guidance` is then the one it samples
    with unless told another; empty: no such input (2210.03142)."""
    distance: AnyDistance = Pixelwise()
    """How f(x_t, t) and its target are compared (CM, section 6.1: LPIPS is best where it applies)."""
    target_decay: float = Field(0.0, ge=0, lt=1)
    """Decay mu of the target's EMA; 0: the student's current weights (CM, Table 3)."""
    form: Literal["skip", "piecewise"] = "skip"
    """How the boundary f(x, sigma_min) = x is built in (CM, eq. 5 or eq. 4)."""

    @property
    def needs_teacher(self) -> bool:
        """Always: the trajectories are the teacher's."""
        return True

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return d(f(x_t, t), f_target(x_r, r)), x_r by one step of the teacher's ODE (CM, Algorithm 2)."""
        x0 = batch.x0
        sigmas = grid_on(context.noise, self.num_scales, x0.device)
        i = torch.randint(self.num_scales - 1, (len(x0),), generator=context.generator, device=x0.device)
        t, r = sigmas[i], sigmas[i + 1]
        x_t = add_noise(x0, draw_eps(x0, context.generator), t)
        with torch.no_grad():
            x_r = STEPS[self.solver](teacher_of(models, batch, self.guidance), x_t, t, r)
        return Loss(consistency_distance(models, batch, context, x_t=x_t, t=t, x_r=x_r, r=r), t)

    def target_decay_at(self, step: int, num_steps: int) -> float:
        """Return mu, constant over steps."""
        return self.target_decay

    @property
    def keeps_target(self) -> bool:
        """Whether the target is an EMA of its own."""
        return self.target_decay > 0
