"""Distribution matching: DMD2 (Yin et al. 2024, arXiv 2405.14867), and SiD's loss (Zhou et al. 2024, 2404.04057).

A student maps noise of one level to images. Its gradient is the difference of two denoisers of its noisy images: the
teacher's, of the data, and the learned score's, of the student's own images. Critic steps train that score, and a
discriminator on the teacher's features. Differs from DMD2's code: one critic step is one optimiser step of its own, as
in FastGen; from SiD's: its loss is a mean over pixels, not a sum times 100, to which Adam is invariant.
"""

from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from cm_core.guidance import WeightRange
from cm_core.methods.base import Batch, Loss, Method, Models, StepContext, conditioned, draw_eps, teacher_of
from cm_core.networks.blocks import in_own_precision
from cm_core.networks.layers import EmbeddedUNet, group_norm
from cm_core.noise import add_noise, draw_lognormal, edm_weight, warp
from cm_core.precond import Precond
from cm_core.solvers import Denoiser
from cm_core.tensors import expand_like

LEAST_ERROR = {"vsd": 1e-6, "sid": 1e-5}  # of the estimates that a sample's weight is the inverse of (FastGen, SiD)


class DMD(Method):
    """Match the distribution of a one-step student's images to the teacher's, at all noise levels."""

    starts_from: ClassVar[Literal["teacher", "random"]] = "teacher"
    form: ClassVar[str] = "generator"

    kind: Literal["dmd"] = "dmd"
    """Name of the method."""
    objective: Literal["vsd", "sid"] = "vsd"
    """The student's loss: the scores' difference as its gradient (DMD), or SiD's, differentiated through both."""
    alpha: float = 1.2
    """Weight of the squared difference in SiD's loss, which vsd has not (SiD: 1.2; SiDA: 1)."""
    generator_sigma: float | None = Field(None, gt=0)
    """The student's only noise level; empty: noise.sigma_max (DMD2; SiD: 2.5)."""
    student_every: int = Field(5, ge=2)
    """Every so many steps one trains the student; the others train the critic (DMD2: 5; SiD: 2)."""
    u_min: float = Field(0.02, ge=0, lt=1)
    """Where the noise levels of the student's loss begin, as a share of the Karras grid (DMD2: 0.02; SiD: 0)."""
    u_max: float = Field(0.98, gt=0, le=1)
    """Where they end (DMD2: 0.98; SiD: 0.8)."""
    score_loss: Literal["plain", "edm"] = "plain"
    """Training of the score: squared error at the student's noise levels (FastGen), or EDM's loss (SiD)."""
    gan_weight: float = Field(1e-3, ge=0)
    """Weight of the adversarial loss in the student's; 0: no discriminator, and no image of the data is used (DMD2)."""
    guidance: float = Field(1.0, ge=0)
    """Weight of the label in the teacher's classifier-free guidance, distilled with it; 1: none (2207.12598)."""
    guidance_range: WeightRange | None = None
    """Range of that weight as an input of the student, drawn for each image; `guidance` is then the one it samples
    with unless told another; empty: no such input (2210.03142)."""

    @model_validator(mode="after")
    def _ordered(self) -> "DMD":
        if self.u_min >= self.u_max:
            raise ValueError(f"u_min={self.u_min} must lie below u_max={self.u_max}")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Always: one of the two scores."""
        return True

    @property
    def cycle(self) -> int:
        """One step of the student, then the critic's."""
        return self.student_every

    def check_network(self, net: nn.Module) -> None:
        """Raise ValueError if the adversarial loss has no features to look at."""
        if self.gan_weight > 0 and not isinstance(net, EmbeddedUNet):
            raise ValueError(
                f"student.method.gan_weight={self.gan_weight:g} needs the features of a U-Net, and the network is an "
                f"{type(net).__name__}; set it to 0"
            )

    def build_discriminator(self, teacher: Precond, image_shape: tuple[int, ...]) -> Precond | None:
        """Return the heads on the teacher's features, with its preconditioning; none without an adversarial loss."""
        if self.gan_weight == 0:
            return None
        self.check_network(teacher.net)
        heads = FeatureHeads(cast(EmbeddedUNet, teacher.net), image_shape)
        return Precond(
            heads,
            sigma_min=teacher.sigma_min,
            sigma_data=teacher.sigma_data,
            c_noise=teacher.c_noise,
            noise_scale=teacher.noise_scale,
            autocast=teacher.autocast,
        )

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return the student's loss or the critic's, by the step."""
        x0, noise = batch.x0, context.noise
        sigma = x0.new_full((len(x0),), self.generator_sigma or noise.sigma_max)
        z, eps = (draw_eps(x0, context.generator) for _ in range(2))
        trains_student = self.trains_student_at(context.step)
        with torch.set_grad_enabled(trains_student):
            made = models.student(expand_like(sigma, z) * z, sigma, *batch.conditions)
        if trains_student:
            return self._student_loss(models, batch, context, made, eps)
        return self._critic_loss(models, batch, context, made, eps)

    def _student_loss(self, models: Models, batch: Batch, context: StepContext, made: Tensor, eps: Tensor) -> Loss:
        """Return the objective plus gan_weight softplus(-C(x_t)) (DMD2, eq. 5)."""
        assert models.score is not None, "the caller builds the score of a method that trains a critic"
        t = self._draw_t(len(made), context)
        x_t = add_noise(made, eps, t)
        teacher, score = teacher_of(models, batch, self.guidance), conditioned(models.score, batch)
        loss = {"vsd": self._vsd, "sid": self._sid}[self.objective](teacher, score, made, x_t, t)
        if models.discriminator is not None:
            loss = loss + self.gan_weight * F.softplus(-logits_of(models.discriminator, x_t, t, batch.labels)).mean(1)
        return Loss(loss, t)

    def _vsd(self, teacher: Denoiser, score: Denoiser, made: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return 1/2 |g - stopgrad(g - w (S - D))|^2, whose gradient in g is w (S - D) / n, w = 1 / mean|g - D|."""
        with torch.no_grad():
            real = teacher(x_t, t)
            direction = _weighted(score(x_t, t) - real, made, real, LEAST_ERROR["vsd"])
        return 0.5 * (made - (made - direction).detach()).square().flatten(1).mean(1)

    def _sid(self, teacher: Denoiser, score: Denoiser, made: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return w (D - S) ((D - g) - alpha (D - S)), with gradients through both denoisers (SiD, eq. 23)."""
        real = teacher(x_t, t)
        gap = real - score(x_t, t)
        product = gap * ((real - made) - self.alpha * gap)
        return _weighted(product, made, real, LEAST_ERROR["sid"]).flatten(1).mean(1)

    def _critic_loss(self, models: Models, batch: Batch, context: StepContext, made: Tensor, eps: Tensor) -> Loss:
        """Return |S(x_t) - g|^2 plus softplus(C(x_t)) + softplus(-C(noisy data)) (DMD2, eq. 5)."""
        assert models.score is not None, "the caller builds the score of a method that trains a critic"
        t, weight = self._draw_t(len(made), context), torch.ones(len(made), device=made.device)
        if self.score_loss == "edm":
            t = draw_lognormal(len(made), p_mean=-1.2, p_std=1.2, generator=context.generator, device=made.device)
            weight = edm_weight(t, context.noise.sigma_data)
        x_t = add_noise(made, eps, t)
        loss = weight * (models.score(x_t, t, *batch.conditions) - made).square().flatten(1).mean(1)
        if models.discriminator is not None:
            t_real = self._draw_t(len(made), context)
            x_real = add_noise(batch.x0, draw_eps(batch.x0, context.generator), t_real)
            x, sigma = (torch.stack(pair, dim=1).flatten(0, 1) for pair in ((x_t, x_real), (t, t_real)))
            labels = None if batch.labels is None else batch.labels.repeat_interleave(2)
            logits = logits_of(models.discriminator, x, sigma, labels)
            loss = loss + (F.softplus(logits[0::2]) + F.softplus(-logits[1::2])).mean(1)
        return Loss(loss, t)

    def _draw_t(self, batch_size: int, context: StepContext) -> Tensor:
        """Draw noise levels, uniform between two places of the Karras grid, [B]."""
        u = torch.rand(batch_size, generator=context.generator, device=context.generator.device)
        return warp(self.u_min + (self.u_max - self.u_min) * u, context.noise)


def _weighted(value: Tensor, made: Tensor, real: Tensor, least: float) -> Tensor:
    """Return `value` over the mean absolute error of the teacher's estimate, of each sample, without gradient."""
    error = (made - real).detach().abs().flatten(1).mean(1).clamp(min=least)
    return value / expand_like(error, value)


def logits_of(discriminator: Precond, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """Return the discriminator's logits of noisy images, [B, K], one for each head and place."""
    _, _, c_in = discriminator.scalings(t)
    return discriminator.raw(expand_like(c_in, x_t) * x_t, t, labels)


class FeatureHeads(nn.Module):
    """Logits [B, K] from a frozen U-Net's encoder, at each resolution by convolutions down to one pixel (DMD2)."""

    def __init__(self, net: EmbeddedUNet, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self._frozen = (net,)  # in a tuple: neither trained nor saved with the heads
        like = next(net.parameters())
        with torch.no_grad():
            features = self._features(like.new_zeros(1, *image_shape), like.new_ones(1))
        self.heads = nn.ModuleList(_head(f.shape[1], min(f.shape[2:])) for f in features)

    def forward(
        self,
        x: Tensor,  # [B, C, H, W]
        noise_labels: Tensor,  # [B]
        class_labels: Tensor | None = None,  # int64 [B]
        augment_labels: Tensor | None = None,  # [B, augment_dim]
    ) -> Tensor:
        features = self._features(x, noise_labels, class_labels, augment_labels)
        return torch.cat([head(f).flatten(1) for head, f in zip(self.heads, features, strict=True)], dim=1)

    def _features(self, x: Tensor, *labels: Tensor | None) -> list[Tensor]:
        """Return the encoder's last output at each resolution, each [B, C', H', W']."""
        (net,) = self._frozen
        labels += (None,) * (3 - len(labels))
        outs = net.unet.encode(x, in_own_precision(net.embed, *labels))
        return list({out.shape[2]: out for out in outs}.values())


def _head(channels: int, size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while size > 1:
        layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels, eps=1e-5), nn.SiLU()]
        size //= 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))
