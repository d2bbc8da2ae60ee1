"""EDM: training a denoiser, the teacher (Karras et al. 2022, arXiv 2206.00364, section 5).

Differs from the paper: the squared error is averaged over pixels, not summed; Adam is invariant to the factor.
"""

from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict, Field

from cm_core.augment import Augment
from cm_core.methods.base import Method, draw_eps
from cm_core.noise import add_noise, draw_lognormal
from cm_core.types import Batch, Loss, Models, StepContext


class EDM(Method):
    """Denoising score matching on lognormal noise levels, weighted so that every level starts with loss 1."""

    model_config = ConfigDict(title="edm")
    form: ClassVar[str] = "denoiser"

    kind: Literal["edm"] = "edm"
    """Name of the method."""
    p_mean: float = -1.2
    """Mean of ln sigma in training (EDM, Table 1)."""
    p_std: float = Field(1.2, gt=0)
    """Standard deviation of ln sigma in training (EDM, Table 1)."""
    label_dropout: float = Field(0.0, ge=0, le=1)
    """Probability of hiding a sample's label, which classifier-free guidance needs (2207.12598)."""
    augment: Augment | None = None
    """Non-leaking geometric augmentation, with its parameters as network input; empty: none (EDM, App. F.2)."""

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return weight(sigma) * |D(x0 + sigma * eps, sigma) - x0|^2 (EDM, eq. 2 and Table 1)."""
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
        sigma_data = context.noise.sigma_data
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        return Loss(weight * (x0_hat - x0).square().flatten(1).mean(1), sigma)
