"""MeanFlow (Geng et al. 2025, arXiv 2505.13447, Algorithm 1), and the loss of improved MeanFlow (2512.02012).

The path is z = (1 - t) x0 + t eps, and u(z, t, t - r) its mean velocity from t down to r. In this package's terms
sigma = t / (1 - t), and z is x / (1 + sigma) (precond.AverageVelocity). Differs from the paper: r has a distribution of
its own and is cut at t, as in the authors' later code; the paper draws both from one and sorts them. The improved
method's auxiliary head is left out: its velocity is u at r = t, which a share of the batch trains.
"""

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from cm_core.augment import Augment
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, draw_eps
from cm_core.networks.modes import derivative
from cm_core.precond import AverageVelocity
from cm_core.tensors import expand_like


class MeanFlow(Method):
    """Match the mean velocity over each interval to the path's velocity less its own change along the path."""

    form: ClassVar[str] = "average_velocity"
    forward_mode: ClassVar[bool] = True

    kind: Literal["meanflow"] = "meanflow"
    """Name of the method."""
    t_mean: float = -0.6
    """Mean of ln t / (1 - t), which is ln sigma (MeanFlow, CIFAR-10: -0.6; iMF: -0.4)."""
    t_std: float = Field(1.6, gt=0)
    """Standard deviation of ln t / (1 - t) (MeanFlow, CIFAR-10: 1.6; iMF: 1.0)."""
    r_mean: float = -4.0
    """Mean of ln r / (1 - r), r cut at t (MeanFlow, CIFAR-10: -4.0; iMF: -0.4)."""
    r_std: float = Field(1.6, gt=0)
    """Standard deviation of ln r / (1 - r) (MeanFlow, CIFAR-10: 1.6; iMF: 1.0)."""
    instant_share: float = Field(0.25, ge=0, lt=1)
    """Probability of r = t, where u is the velocity itself (MeanFlow, CIFAR-10: 0.25; iMF: 0.5)."""
    tangent: Literal["sampled", "predicted"] = "sampled"
    """Direction of the derivative: the sampled velocity eps - x0, or the network's own u(z, t, 0) (iMF)."""
    power: float = Field(0.75, ge=0)
    """p of the weight 1 / (error + c)^p, the error summed over the image (MeanFlow, CIFAR-10: 0.75; iMF: 1)."""
    power_c: float = Field(1e-3, gt=0)
    """c of that weight (MeanFlow: 1e-3; iMF: 0.01)."""
    augment: Augment | None = None
    """Non-leaking geometric augmentation, with its parameters as network input; empty: none (EDM, App. F.2)."""

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return |u + (t - r) stopgrad(du/dt) - v|^2 / stopgrad(the same + c)^p (MeanFlow, eq. 11 and 22)."""
        x0, augment_labels = batch.x0, None
        if self.augment is not None:
            x0, augment_labels = self.augment(x0, context.generator)
        t, r = self.draw_times(len(x0), context.generator)
        eps, span = draw_eps(x0, context.generator), t - r
        z, v = expand_like(1 - t, x0) * x0 + expand_like(t, x0) * eps, eps - x0
        student = cast(AverageVelocity, models.student)  # by the form above

        def velocity(z: Tensor, t: Tensor, span: Tensor) -> Tensor:
            return student.velocity(z, t, span, batch.labels, augment_labels)

        with torch.no_grad():
            along = velocity(z, t, torch.zeros_like(t)) if self.tangent == "predicted" else v
            _, change = derivative(velocity, (z, t, span), (along, torch.ones_like(t), torch.ones_like(t)))
        error = (velocity(z, t, span) + expand_like(span, x0) * change - v).square().flatten(1).sum(1)
        return Loss(error / (error.detach() + self.power_c) ** self.power, t / (1 - t))

    def draw_times(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return t and r <= t in 0..1, each [B]: logistic-normal, r = t with the given probability."""
        normal = torch.randn(2, batch_size, generator=generator, device=generator.device)
        t, r = (self.t_mean + self.t_std * normal[0]).sigmoid(), (self.r_mean + self.r_std * normal[1]).sigmoid()
        instant = torch.rand(batch_size, generator=generator, device=generator.device) < self.instant_share
        return t, torch.where(instant, t, torch.minimum(t, r))
