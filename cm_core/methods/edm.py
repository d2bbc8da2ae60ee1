"""EDM: training a denoiser, the teacher (Karras et al. 2022, arXiv 2206.00364, section 5).

EDM2 (2312.02696) learns the weight of each noise level beside EDM's: `adaptive_weight`. Its linear layer is free here,
not of unit length as in EDM2's code, and starts with equal weights.
Differs from the paper: the squared error is averaged over pixels, not summed; Adam is invariant to the factor.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from cm_core.augment import Augment
from cm_core.methods.base import FEATURES, Batch, LogWeight, Loss, Method, Models, StepContext, draw_eps, weighted
from cm_core.noise import add_noise, draw_lognormal, edm_weight


class EDM(Method):
    """Denoising score matching on lognormal noise levels, weighted so that every level starts with loss 1."""

    form: ClassVar[str] = "denoiser"

    kind: Literal["edm"] = "edm"
    """Name of the method."""
    p_mean: float = -1.2
    """Mean of ln sigma in training (EDM, Table 1: -1.2; EDM2: ImageNet-64 -0.8, latents -0.4)."""
    p_std: float = Field(1.2, gt=0)
    """Standard deviation of ln sigma in training (EDM, Table 1: 1.2; EDM2: ImageNet-64 1.6, latents 1.0)."""
    label_dropout: float = Field(0.0, ge=0, le=1)
    """Probability of hiding a sample's label, which classifier-free guidance needs (2207.12598)."""
    adaptive_weight: bool = False
    """Learn the weight of each noise level, its uncertainty, with the network (EDM2, section 2.2)."""
    augment: Augment | None = None
    """Non-leaking geometric augmentation, with its parameters as network input; empty: none (EDM, App. F.2)."""

    def build_weighting(self) -> nn.Module | None:
        """Return the learned log-weight of a noise level."""
        # Features of unit length together, as in EDM2, whose rates are a hundred times those of other networks.
        return LogWeight(math.sqrt(2 / FEATURES)) if self.adaptive_weight else None

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return weight(sigma) * |D(x0 + sigma * eps, sigma) - x0|^2 (EDM, eq. 2 and Table 1; EDM2, eq. 21)."""
        x0, labels, generator = batch.x0, batch.labels, context.generator
        augment_labels = None
        if self.augment is not None:
            x0, augment_labels = self.augment(x0, generator)
        if labels is not None and self.label_dropout > 0:
            hidden = torch.rand(labels.shape, generator=generator, device=labels.device) < self.label_dropout
            labels = labels.masked_fill(hidden, -1)
        sigma = draw_lognormal(len(x0), p_mean=self.p_mean, p_std=self.p_std, generator=generator, device=x0.device)
        x_t = add_noise(x0, draw_eps(x0, generator), sigma)
        x0_hat = models.student(x_t, sigma, labels, augment_labels)
        error = edm_weight(sigma, context.noise.sigma_data) * (x0_hat - x0).square().flatten(1).mean(1)
        return Loss(error if models.weighting is None else weighted(error, models.weighting(sigma)), sigma)
