"""Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512) on the Karras grid, as compared in CM, App. C.

Differs from the paper: EDM's denoiser and grid in place of a cosine schedule, as in the code of consistency models.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cm_core.curricula import Halving, pd_halving
from cm_core.distances import AnyDistance, Pixelwise
from cm_core.guidance import WeightRange
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, conditioned, draw_eps, grid_on, teacher_of
from cm_core.noise import add_noise
from cm_core.solvers import Denoiser, euler_step
from cm_core.tensors import expand_like


class PD(Method):
    """Halve the steps repeatedly: one Euler step of the student lands where two of the teacher land."""

    starts_from: ClassVar[Literal["teacher", "random"]] = "teacher"
    form: ClassVar[str] = "euler"

    kind: Literal["pd"] = "pd"
    """Name of the method."""
    start_steps: int = Field(4096, ge=1)
    """Steps of the first student; its teacher takes twice as many (CM, App. C: 4096)."""
    end_steps: int = Field(1, ge=1)
    """Steps of the last student, with which images are made; start_steps is this times a power of two."""
    distance: AnyDistance = Pixelwise()
    """How the student's estimate and the teacher's are compared (CM, Table 1: squared l2, or LPIPS)."""
    guidance: float = Field(1.0, ge=0)
    """Weight of the label in the teacher's classifier-free guidance, distilled with it; 1: none (2207.12598)."""
    guidance_range: WeightRange | None = None
    """Range of that weight as an input of the student, drawn for each image; `guidance` is then the one it samples
    with unless told another; empty: no such input (2210.03142)."""
    anneal: bool = True
    """Lower the learning rate linearly to zero within each halving (PD, App. C)."""

    @model_validator(mode="after")
    def _halves(self) -> "PD":
        ratio = self.start_steps / self.end_steps
        if ratio < 1 or ratio != int(ratio) or int(ratio) & (int(ratio) - 1):
            raise ValueError(
                f"start_steps={self.start_steps} must be end_steps={self.end_steps} times a power of two, such as "
                f"{self.end_steps * 64}"
            )
        return self

    @property
    def needs_teacher(self) -> bool:
        """Always: the first teacher is the diffusion model."""
        return True

    @property
    def replaces_teacher(self) -> bool:
        """Always: the student of one halving is the teacher of the next."""
        return True

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return max(1 / t^2, 1) d(D(x_t, t), the x0 whose single Euler step lands where two of the teacher land)."""
        x0, halving = batch.x0, self.halving_at(context.step, context.num_steps)
        n = halving.num_intervals
        sigmas = grid_on(context.noise, 2 * n + 1, x0.device)
        i = 2 * torch.randint(n, (len(x0),), generator=context.generator, device=x0.device)
        t, middle, r = sigmas[i], sigmas[i + 1], sigmas[i + 2]
        x_t = add_noise(x0, draw_eps(x0, context.generator), t)
        with torch.no_grad():
            target = two_step_estimate(self._teacher(models, batch, halving), x_t, t, middle, r)
        x0_hat = models.student(x_t, t, *batch.conditions)
        assert models.distance is not None, "the caller builds method.distance"
        weight = (1 / t**2).clamp(min=1)  # the truncated signal-to-noise ratio (PD, section 4)
        return Loss(weight * models.distance(x0_hat, target), t, {"num_intervals": n})

    def _teacher(self, models: Models, batch: Batch, halving: Halving) -> Denoiser:
        """Return the guided diffusion model, and later the student of the halving before, which includes guidance."""
        if halving.first == 0:
            return teacher_of(models, batch, self.guidance)
        assert models.teacher is not None, "the caller loads the teacher that the method needs"
        return conditioned(models.teacher, batch)

    def halving_at(self, step: int, num_steps: int) -> Halving:
        """Return the round of a step."""
        return pd_halving(step, num_steps=num_steps, start_steps=self.start_steps, end_steps=self.end_steps)

    def euler_steps_at(self, step: int, num_steps: int) -> int:
        """Return the student's Euler steps in the round of the last training step."""
        return self.halving_at(max(step - 1, 0), num_steps).num_intervals

    def replaces_teacher_at(self, step: int, num_steps: int) -> bool:
        """Whether a halving begins with `step`; the first uses the diffusion model as its teacher."""
        return step > 0 and step == self.halving_at(step, num_steps).first

    def learning_rate_factor(self, step: int, num_steps: int) -> float:
        """Return the linear decay within the halving."""
        _, first, end = self.halving_at(step, num_steps)
        return 1 - (step - first) / (end - first) if self.anneal else 1.0


def two_step_estimate(teacher: Denoiser, x_t: Tensor, t: Tensor, middle: Tensor, r: Tensor) -> Tensor:
    """Return the x0 from which one Euler step t -> r lands where the teacher's steps t -> middle -> r land."""
    x_r = euler_step(teacher, euler_step(teacher, x_t, t, middle), middle, r)
    return x_t - expand_like(t / (r - t), x_t) * (x_r - x_t)
