"""sCM: continuous-time consistency models in TrigFlow (Lu and Song 2024, arXiv 2410.11081, Algorithm 1); sCT and sCD.

TrigFlow's angle is arctan(sigma / sigma_data), its x is cos(angle) x_sigma and its F is minus the raw network behind
EDM's scalings, so samplers treat a model trained here like any other; `noise.c_noise: angle` is the paper's embedding.
Differs from the paper: nothing. As d/d(ln sigma) = cos sin d/d(angle), its rearranged tangent of sigma is sigma itself.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cm_core.guidance import WeightRange
from cm_core.methods.base import (
    Batch,
    LogWeight,
    Loss,
    Method,
    Models,
    StepContext,
    draw_eps,
    teacher_of,
    weighted,
)
from cm_core.networks.modes import derivative
from cm_core.noise import add_noise, draw_lognormal
from cm_core.tensors import expand_like


class SCM(Method):
    """Pull f along its own derivative on the trajectory until that vanishes, without a grid."""

    starts_from: ClassVar[Literal["teacher", "random"]] = "teacher"
    form: ClassVar[str] = "unshifted"
    forward_mode: ClassVar[bool] = True

    kind: Literal["scm"] = "scm"
    """Name of the method."""
    distil: bool = False
    """Follow the teacher's trajectories (sCD), or the straight noise paths of the data (sCT)."""
    guidance: float = Field(1.0, ge=0)
    """Weight of the label in the teacher's classifier-free guidance, distilled with it; 1: none (2207.12598)."""
    guidance_range: WeightRange | None = None
    """Range of that weight as an input of the student, drawn for each image; `guidance` is then the one it samples
    with unless told another; empty: no such input (2210.03142)."""
    p_mean: float = -1.0
    """Mean of ln sigma (sCM: -1.0; ImageNet-512 -0.8)."""
    p_std: float = Field(1.4, gt=0)
    """Standard deviation of ln sigma (sCM: CIFAR-10 1.4, ImageNet 1.6)."""
    warmup_steps: int = Field(10_000, ge=0)
    """Steps over which the unstable part of the tangent comes in (sCM, section 4.2)."""
    tangent: Literal["normalise", "clip"] = "normalise"
    """Bound on the tangent: g / (|g| + c) of each sample, or each value to -1..1 (sCM, section 4.2)."""
    tangent_c: float = Field(0.1, gt=0)
    """c of the normalisation (sCM, section 4.2)."""
    adaptive_weight: bool = True
    """Learn the weight of each noise level with the student (sCM, section 4.2; EDM2)."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the trajectories are the teacher's."""
        return self.distil

    def build_weighting(self) -> nn.Module | None:
        """Return the learned log-weight of a noise level."""
        return LogWeight() if self.adaptive_weight else None

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return exp(w) |F - F_minus - g|^2 / D - w, g the bounded tangent (sCM, Algorithm 1)."""
        sigma = draw_lognormal(
            len(batch.x0), p_mean=self.p_mean, p_std=self.p_std, generator=context.generator, device=batch.x0.device
        )
        share = min(1.0, context.step / self.warmup_steps) if self.warmup_steps else 1.0
        with torch.no_grad():
            x_in, f_minus, g = self.tangent_at(models, batch, context, sigma, share)
            g = self.bound(g)
        f = -models.student.raw(x_in, sigma, *batch.conditions)
        error = (f - f_minus - g).square().flatten(1).mean(1)
        log_weight = models.weighting(sigma) if models.weighting is not None else torch.zeros_like(sigma)
        return Loss(weighted(error, log_weight), sigma, {"tangent_share": share})

    def tangent_at(
        self, models: Models, batch: Batch, context: StepContext, sigma: Tensor, share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the network's input x_t / sigma_data, F there, and g = cos(angle) df/d(angle) where `share` is 1."""
        x0, sigma_data = batch.x0, context.noise.sigma_data
        angle = (sigma / sigma_data).atan()
        cos, sin = expand_like(angle.cos(), x0), expand_like(angle.sin(), x0)
        eps = draw_eps(x0, context.generator)
        x_t = cos * x0 + sin * sigma_data * eps
        velocity = cos * sigma_data * eps - sin * x0  # dx/d(angle) on the straight path
        if self.distil:
            velocity = (cos * x_t - teacher_of(models, batch, self.guidance)(add_noise(x0, eps, sigma), sigma)) / sin

        def network(x_in: Tensor, sigma: Tensor) -> Tensor:
            return -models.student.raw(x_in, sigma, *batch.conditions)

        x_in = x_t / sigma_data
        f, df = derivative(network, (x_in, sigma), (cos * sin * velocity / sigma_data, sigma))
        unstable = cos * sin * x_t + sigma_data * df
        return x_in, f, -(cos**2) * (sigma_data * f - velocity) - share * unstable

    def bound(self, g: Tensor) -> Tensor:
        """Return the tangent normalised or clipped, [B, ...]."""
        if self.tangent == "clip":
            return g.clamp(-1, 1)
        return g / (expand_like(g.flatten(1).norm(dim=1), g) + self.tangent_c)
