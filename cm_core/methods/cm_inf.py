"""Continuous-time objectives of the first paper (Song et al. 2023, arXiv 2303.01469, App. B). Historical: see scm.py.

v is df/dsigma along a trajectory: the teacher's (CD-inf) or the straight noise path (CT-inf). Differs from the released
code: l2 is the squared norm, as printed, not its root; like l1 it is a mean over the sample, as everywhere here.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cm_core.distances import AnyDistance, Distance, Pixelwise
from cm_core.guidance import WeightRange
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, draw_eps, teacher_of
from cm_core.networks.modes import derivative
from cm_core.noise import add_noise, warp
from cm_core.solvers import slope


class CMInf(Method):
    """Make df/dsigma vanish along trajectories directly, or along the limit of the discrete gradient."""

    starts_from: ClassVar[Literal["teacher", "random"]] = "teacher"
    forward_mode: ClassVar[bool] = True

    kind: Literal["cm_inf"] = "cm_inf"
    """Name of the method."""
    distil: bool = True
    """Follow the teacher's trajectories (CD-inf), or the straight noise paths of the data (CT-inf)."""
    guidance: float = Field(1.0, ge=0)
    """Weight of the label in the teacher's classifier-free guidance, distilled with it; 1: none (2207.12598)."""
    guidance_range: WeightRange | None = None
    """Range of that weight as an input of the student, drawn for each image; `guidance` is then the one it samples
    with unless told another; empty: no such input (2210.03142)."""
    stop_gradient: bool = True
    """Stop the gradient at the target, as the discrete losses do, or let it flow through df/dsigma (CM, App. B)."""
    distance: AnyDistance = Pixelwise()
    """The metric whose Hessian weighs df/dsigma: l1 and l2 without stop_gradient, all but l1 with it (CM, App. B)."""
    form: Literal["skip", "piecewise"] = "skip"
    """How the boundary f(x, sigma_min) = x is built in (CM, eq. 5 or eq. 4)."""

    @model_validator(mode="after")
    def _defined(self) -> "CMInf":
        kind = self.distance.kind
        if self.stop_gradient and kind == "l1":
            raise ValueError(
                "distance l1 has no Hessian, which stop_gradient=true needs; use l2, pseudo_huber or lpips"
            )
        if not self.stop_gradient and kind not in ("l1", "l2"):
            raise ValueError(f"distance {kind} is not defined with stop_gradient=false; use l1 or l2")
        if not self.stop_gradient and not self.distil:
            raise ValueError("distil=false (CT-inf) exists with stop_gradient=true only (CM, App. B)")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether the trajectories are the teacher's."""
        return self.distil

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return mean |v| or mean v^2 of v = df/dsigma, or <f, H stopgrad(v)> with the metric's Hessian H."""
        x0 = batch.x0
        t, eps = self._draw_t(len(x0), context), draw_eps(x0, context.generator)
        x_t = add_noise(x0, eps, t)
        if self.distil:
            with torch.no_grad():
                dx = slope(teacher_of(models, batch, self.guidance), x_t, t)
        else:
            dx = eps

        def f(x: Tensor, sigma: Tensor) -> Tensor:
            return models.student(x, sigma, *batch.conditions)

        with torch.set_grad_enabled(not self.stop_gradient):
            x0_hat, v = derivative(f, (x_t, t), (dx, torch.ones_like(t)))
        if not self.stop_gradient:
            return Loss((v.abs() if self.distance.kind == "l1" else v.square()).flatten(1).mean(1), t)
        assert models.distance is not None, "the caller builds method.distance"
        pull = hessian_product(models.distance, x0_hat, v)
        return Loss((f(x_t, t) * pull).flatten(1).sum(1), t)

    def _draw_t(self, batch_size: int, context: StepContext) -> Tensor:
        """Draw sigma uniform in sigma^(1/rho), [B]: the Karras grid's density in the limit."""
        noise, generator = context.noise, context.generator
        u = torch.rand(batch_size, generator=generator, device=generator.device)
        return warp(u, noise)


def hessian_product(distance: Distance, at: Tensor, v: Tensor) -> Tensor:
    """Return H v, H the Hessian of d(a, at) in a where a = at, [B, ...] (CM, App. B)."""
    with torch.enable_grad():
        a = at.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(distance(a, at.detach()).sum(), a, create_graph=True)
        (product,) = torch.autograd.grad((gradient * v.detach()).sum(), a)
    return product
