"""Consistency mid-training: regress each point of a teacher's trajectory on its end (CMT, Hu et al., arXiv 2509.24526).

Its model is a start for another method's training (the recipe's section `base`). Of the data it uses nothing but the
shape of the images and their labels: trajectories start from noise, and are walked in the step that learns from them.
Differs from the authors' code: its trajectories start from an image with noise of sigma_max, and its DPM-Solver++ has
order 3, lower in the first two and the last two steps.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cm_core.distances import AnyDistance, Pixelwise
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, draw_eps, teacher_of
from cm_core.noise import Noise
from cm_core.solvers import Denoiser, dpmpp_step, heun_step


class CMT(Method):
    """Walk the teacher from noise to an image, and pull f at every point on the way to that image."""

    starts_from: ClassVar[Literal["teacher", "random"]] = "teacher"

    kind: Literal["cmt"] = "cmt"
    """Name of the method."""
    num_steps: int = Field(16, ge=2)
    """Steps of a trajectory from sigma_max to sigma_min; its points fill as many rows of the batch (CMT: 16)."""
    solver: Literal["dpmpp", "heun"] = "dpmpp"
    """The teacher's step: multistep DPM-Solver++, one network call, or Heun's, two (CMT: the former)."""
    guidance: float = Field(1.0, ge=0)
    """Weight of the label in the teacher's classifier-free guidance, distilled with it; 1: none (2207.12598)."""
    distance: AnyDistance = Pixelwise()
    """How f(x_t, t) and the trajectory's end are compared (CMT: LPIPS where it applies)."""
    form: Literal["unshifted", "skip", "piecewise"] = "unshifted"
    """How the boundary is built in: at 0 as ECT and sCM have it, or at sigma_min (CM, eq. 5 or eq. 4)."""

    @property
    def needs_teacher(self) -> bool:
        """Always: the trajectories are the teacher's."""
        return True

    @property
    def batch_multiple(self) -> int:
        """The rows of one trajectory."""
        return self.num_steps

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return d(f(x_t, t), x_end) at each point of batch size / num_steps trajectories, a trajectory's adjacent.

        A trajectory has the label of the first of its rows.
        """
        n, labels = self.num_steps, None if batch.labels is None else batch.labels[:: self.num_steps]
        sigmas = self.levels(context.noise).to(batch.x0.device, torch.float32)
        x = sigmas[0] * draw_eps(batch.x0[::n], context.generator)
        with torch.no_grad():
            teacher = teacher_of(models, batch._replace(labels=labels), self.guidance)
            *points, end = self.trajectory(teacher, x, sigmas)
        x_t, t = torch.stack(points, dim=1).flatten(0, 1), sigmas[:-1].repeat(len(x))
        x0_hat = models.student(x_t, t, None if labels is None else labels.repeat_interleave(n))
        assert models.distance is not None, "the caller builds method.distance"
        return Loss(models.distance(x0_hat, end.repeat_interleave(n, dim=0)), t)

    def levels(self, noise: Noise) -> Tensor:
        """Return num_steps + 1 levels, evenly spaced in the logarithm of the signal-to-noise ratio, float64."""
        steps = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)
        return noise.sigma_max * (noise.sigma_min / noise.sigma_max) ** steps

    def trajectory(self, teacher: Denoiser, x: Tensor, sigmas: Tensor) -> list[Tensor]:
        """Return the states at decreasing levels `sigmas` of the ODE through x [B, ...] at the first, each like x."""
        points, earlier = [x], None
        for t, r in zip(*(levels.expand(len(x), -1).T for levels in (sigmas[:-1], sigmas[1:])), strict=True):
            if self.solver == "heun":
                x = heun_step(teacher, x, t, r)
            else:
                estimate = teacher(x, t)
                x, earlier = dpmpp_step(estimate, x, t, r, earlier), (estimate, t)
            points.append(x)
        return points
