"""Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548), and its distilling variant.

Differs from the released code: the network is never evaluated at r = 0, where f(x, 0) = x needs none; the distance
keeps a tiny c, so that equal images have a gradient; the same preconditioning trains and samples.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cm_core.curricula import ect_stage
from cm_core.distances import AnyDistance, PseudoHuber
from cm_core.guidance import WeightRange
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, draw_eps, teacher_of
from cm_core.noise import add_noise, draw_lognormal, edm_weight
from cm_core.solvers import STEPS
from cm_core.tensors import expand_like


class ECT(Method):
    """Tune a denoiser into a consistency function: pairs (t, r) start as denoising and close up in stages."""

    starts_from: ClassVar[Literal["teacher", "random"]] = "teacher"
    form: ClassVar[str] = "unshifted"

    kind: Literal["ect"] = "ect"
    """Name of the method."""
    p_mean: float = -1.1
    """Mean of ln t (ECT: -1.1 on CIFAR-10, -0.8 on ImageNet-64)."""
    p_std: float = Field(2.0, gt=0)
    """Standard deviation of ln t (ECT: 2.0 on CIFAR-10, 1.6 on ImageNet-64)."""
    q: float = Field(2.0, gt=1)
    """Factor by which the gap 1 - r/t shrinks from stage to stage (ECT: 2 on CIFAR-10, 4 on ImageNet-64)."""
    num_stages: int = Field(8, ge=1)
    """Stages of equal length; the gap ends at 1 / q^num_stages (ECT: 8 on CIFAR-10, 4 on ImageNet-64)."""
    mapping: Literal["sigmoid", "const"] = "sigmoid"
    """n(t) = 1 + k sigmoid(-b t), wider gaps at small t, or n(t) = 1 (ECT, section 3)."""
    k: float = Field(8.0, ge=0)
    """Height of the sigmoid (ECT)."""
    b: float = Field(1.0, gt=0)
    """Steepness of the sigmoid (ECT)."""
    weighting: Literal["inverse_gap", "edm"] = "inverse_gap"
    """1 / (t - r) (ECT on CIFAR-10), or (t^2 + sigma_data^2) / (t sigma_data)^2 (ECT on ImageNet-64)."""
    distance: AnyDistance = PseudoHuber(c_per_sqrt_dim=1e-8)
    """How f(x_t, t) and its target are compared (ECT: the norm; on ImageNet-64 pseudo-Huber with c = 0.06)."""
    solver: Literal["euler", "heun"] | None = None
    """The teacher's step from t to r; empty: no teacher, x_r has the same noise as x_t."""
    guidance: float = Field(1.0, ge=0)
    """Weight of the label in the teacher's classifier-free guidance, distilled with it; 1: none (2207.12598)."""
    guidance_range: WeightRange | None = None
    """Range of that weight as an input of the student, drawn for each image; `guidance` is then the one it samples
    with unless told another; empty: no such input (2210.03142)."""

    @property
    def needs_teacher(self) -> bool:
        """Whether x_r comes from a teacher."""
        return self.solver is not None

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return w(t, r) d(f(x_t, t), stopgrad f(x_r, r)), the target x_r itself if r = 0 (ECT, section 3)."""
        x0, stage = batch.x0, ect_stage(context.step, num_steps=context.num_steps, num_stages=self.num_stages)
        t = draw_lognormal(len(x0), p_mean=self.p_mean, p_std=self.p_std, generator=context.generator, device=x0.device)
        r, eps = self.closer(t, stage), draw_eps(x0, context.generator)
        x_t = add_noise(x0, eps, t)
        x0_hat = models.student(x_t, t, *batch.conditions)
        with torch.no_grad():
            x_r = self._earlier(models, batch, x_t, t, r) if self.needs_teacher else add_noise(x0, eps, r)
            asked = torch.where(r > 0, r, t)  # at 0 the network is undefined, and not needed
            target = torch.where(expand_like(r > 0, x0), models.target(x_r, asked, *batch.conditions), x_r)
        assert models.distance is not None, "the caller builds method.distance"
        scalars = {"stage": stage, "gap": self.q ** -(stage + 1)}
        return Loss(self.weight(t, r, context.noise.sigma_data) * models.distance(x0_hat, target), t, scalars)

    def closer(self, t: Tensor, stage: int) -> Tensor:
        """Return r(t) = t (1 - n(t) / q^(stage + 1)), at least 0, [B] (ECT, section 3)."""
        n = 1 + self.k * torch.sigmoid(-self.b * t) if self.mapping == "sigmoid" else torch.ones_like(t)
        return (t * (1 - n / self.q ** (stage + 1))).clamp(min=0)

    def weight(self, t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
        """Return w(t, r), [B]."""
        if self.weighting == "inverse_gap":
            return 1 / (t - r)
        return edm_weight(t, sigma_data)

    def _earlier(self, models: Models, batch: Batch, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        teacher = teacher_of(models, batch, self.guidance)
        euler = STEPS["euler"](teacher, x_t, t, r)
        if self.solver == "euler":
            return euler
        # Heun's second slope is undefined at r = 0: there the step stays Euler's, as in EDM's sampler.
        heun = STEPS["heun"](teacher, x_t, t, torch.where(r > 0, r, t))
        return torch.where(expand_like(r > 0, x_t), heun, euler)
