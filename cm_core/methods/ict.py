"""Improved consistency training (Song and Dhariwal 2023, arXiv 2310.14189).

Differs from the paper: N(k) doubles by one division, so that runs shorter than its levels have them, too.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from cm_core.curricula import ict_num_scales
from cm_core.distances import AnyDistance, PseudoHuber
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, consistency_distance, draw_eps, grid_on
from cm_core.noise import add_noise, lognormal_pair_probabilities


class ICT(Method):
    """Consistency training with a pseudo-Huber distance, lognormal pairs, doubling grids and no target EMA."""

    kind: Literal["ict"] = "ict"
    """Name of the method."""
    s0: int = Field(10, ge=1)
    """Grid intervals at the start (iCT, Table 1)."""
    s1: int = Field(1280, ge=1)
    """Grid intervals at the end (iCT, Table 1)."""
    p_mean: float = -1.1
    """Mean of ln sigma, discretised to the grid (iCT, section 3.5)."""
    p_std: float = Field(2.0, gt=0)
    """Standard deviation of ln sigma (iCT, section 3.5)."""
    distance: AnyDistance = PseudoHuber()
    """How f(x_t, t) and its target are compared (iCT, section 3.3)."""
    form: Literal["skip", "piecewise"] = "skip"
    """How the boundary f(x, sigma_min) = x is built in (CM, eq. 5 or eq. 4)."""

    @model_validator(mode="after")
    def _grows(self) -> "ICT":
        if self.s1 < self.s0:
            raise ValueError(f"s1={self.s1} must be at least s0={self.s0}")
        return self

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return d(f(x0 + t eps, t), stopgrad f(x0 + r eps, r)) / (t - r) (iCT, section 3)."""
        x0 = batch.x0
        num_scales = ict_num_scales(context.step, num_steps=context.num_steps, s0=self.s0, s1=self.s1)
        sigmas = grid_on(context.noise, num_scales, x0.device)
        probabilities = lognormal_pair_probabilities(sigmas, p_mean=self.p_mean, p_std=self.p_std)
        i = torch.multinomial(probabilities, len(x0), replacement=True, generator=context.generator)
        t, r = sigmas[i], sigmas[i + 1]
        eps = draw_eps(x0, context.generator)
        x_t, x_r = add_noise(x0, eps, t), add_noise(x0, eps, r)
        distance = consistency_distance(models, batch, context, x_t=x_t, t=t, x_r=x_r, r=r)
        return Loss(distance / (t - r), t, {"num_scales": num_scales})
