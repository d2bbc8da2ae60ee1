"""Truncated consistency models: a second stage at large noise levels alone (TCM, Lee et al. 2024, arXiv 2410.14895).

The first stage's model, frozen, answers at the lower levels. Differs from the paper: the pairs at the dividing level
are a random share of each batch, weighed by its expectation, and the other levels are drawn through a table of their
distribution.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cm_core.distances import AnyDistance, PseudoHuber
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, draw_eps
from cm_core.noise import Noise, add_noise
from cm_core.tensors import expand_like

TABLE = 4096  # places of the distribution of levels
SMALLEST = 1e-6  # noise level r of a pair (TCM's code)


class TCM(Method):
    """Make f agree above a dividing level, and there with a consistency function that is known below it."""

    needs_base: ClassVar[bool] = True

    kind: Literal["tcm"] = "tcm"
    """Name of the method."""
    split: float = Field(1.0, gt=0)
    """The dividing noise level t': below it the base is f, from it on the student (TCM: 1)."""
    loc: float = 0.0
    """Location of ln t, a Student t cut to split .. sigma_max (TCM: 0)."""
    scale: float = Field(0.2, gt=0)
    """Scale of ln t (TCM: 0.2)."""
    freedom: float = Field(0.01, gt=0)
    """Degrees of freedom of ln t; fewer have heavier tails, which reach sigma_max (TCM: 0.01)."""
    ratio: float = Field(0.999, gt=0, lt=1)
    """r / t of a pair far above the split; the gap is wider near it, by 1 + k sigmoid(-t) (TCM: 0.999)."""
    k: float = Field(8.0, ge=0)
    """Height of that sigmoid (TCM, as ECT: 8)."""
    boundary_share: float = Field(0.25, ge=0, lt=1)
    """Probability of t = split, whose target is the base's (TCM: 0.25)."""
    boundary_weight: float = Field(0.1, gt=0)
    """Weight of these pairs' mean loss beside that of the others (TCM: 0.1)."""
    distance: AnyDistance = PseudoHuber(c_per_sqrt_dim=1e-8)
    """How f(x_t, t) and its target are compared (TCM, as ECT: the norm on CIFAR-10)."""
    form: Literal["unshifted", "skip", "piecewise"] = "unshifted"
    """The base's form: its boundary at 0, or at sigma_min (CM, eq. 5 or eq. 4)."""

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return w d(f(x_t, t), stopgrad f(x_r, r)) / (t - r), f below split the base's (TCM, section 4).

        Its expectation is the others' mean loss plus boundary_weight times that of the pairs at the split.
        """
        x0, device = batch.x0, batch.x0.device
        t = self.draw_t(len(x0), context.noise, context.generator)
        at_split = torch.rand(len(x0), generator=context.generator, device=device) < self.boundary_share
        t = torch.where(at_split, self.split, t)
        r, eps = self.closer(t), draw_eps(x0, context.generator)
        x0_hat = models.student(add_noise(x0, eps, t), t, batch.labels)
        assert models.base is not None, "the caller loads the base of a method that needs it"
        with torch.no_grad():
            x_r = add_noise(x0, eps, r)
            above, below = (model(x_r, r, batch.labels) for model in (models.target, models.base))
            target = torch.where(expand_like(r < self.split, x0), below, above)
        assert models.distance is not None, "the caller builds method.distance"
        share = self.boundary_share
        weight = torch.where(at_split, self.boundary_weight / share if share else 0.0, 1 / (1 - share)) / (t - r)
        return Loss(weight * models.distance(x0_hat, target), t)

    def closer(self, t: Tensor) -> Tensor:
        """Return r(t) = t - t (1 - ratio) (1 + k sigmoid(-t)), above 0, [B] (TCM's code; ECT, section 3)."""
        return (t * (1 - (1 - self.ratio) * (1 + self.k * torch.sigmoid(-t)))).clamp(min=SMALLEST)

    def draw_t(self, batch_size: int, noise: Noise, generator: torch.Generator) -> Tensor:
        """Draw noise levels in split .. sigma_max, float32 [B]."""
        u = torch.rand(batch_size, generator=generator, device=generator.device)
        return self.quantiles(u, noise)

    def quantiles(self, u: Tensor, noise: Noise) -> Tensor:
        """Return the levels below which the shares `u` of all draws lie, like u [B]; continuous in u.

        With ln t = loc + scale sqrt(freedom) sinh(v), the density of v is cosh(v)^-freedom: smooth, hence the table.
        """
        width = self.scale * math.sqrt(self.freedom)
        low, high = (math.asinh((math.log(level) - self.loc) / width) for level in (self.split, noise.sigma_max))
        v = torch.linspace(low, high, TABLE, dtype=torch.float64, device=u.device)
        density = v.cosh() ** -self.freedom
        share = torch.cat([density.new_zeros(1), ((density[1:] + density[:-1]) / 2).cumsum(0)])
        share = share / share[-1]
        place = torch.searchsorted(share, u.double(), right=True).clamp(1, TABLE - 1)
        below, above = share[place - 1], share[place]
        at = v[place - 1] + (u - below) / (above - below) * (v[place] - v[place - 1])
        return (self.loc + width * at.sinh()).exp().clamp(self.split, noise.sigma_max).to(u.dtype)
