"""Shared parts of the methods: their interface, and the consistency loss between two points of a trajectory."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn

from cm_core.guidance import check_weight, guided
from cm_core.noise import Noise
from cm_core.params import Params
from cm_core.precond import Precond
from cm_core.solvers import Denoiser

FEATURES = 128  # of LogWeight (EDM2)


class Batch(NamedTuple):
    """A training batch on the device."""

    x0: Tensor  # [B, C, H, W] float32 in -1..1
    labels: Tensor | None  # [B] int64, -1 for none; None for unconditional networks
    guidance: Tensor | None = None  # [B] float32, weights of guidance; None for students without such an input

    @property
    def conditions(self) -> tuple[Tensor | None, ...]:
        """The student's inputs beside x and sigma, in the order of `Precond.forward`."""
        return (self.labels,) if self.guidance is None else (self.labels, None, self.guidance)


@dataclass(frozen=True)
class Models:
    """The networks of one training step. Gradients go to the student and the weighting, or to the critic's two."""

    student: Precond
    target: Precond  # the student itself if the method keeps no EMA
    teacher: Precond | None = None
    distance: Callable[[Tensor, Tensor], Tensor] | None = None
    weighting: nn.Module | None = None  # sigma [B] -> log-weight [B], learned with the student
    score: Precond | None = None  # the critic's denoiser, of the student's images
    discriminator: Precond | None = None  # the critic's logits of noisy images
    base: Precond | None = None  # the student's frozen initial weights


@dataclass(frozen=True)
class StepContext:
    """The position of a step in the training, and its randomness."""

    step: int
    num_steps: int
    noise: Noise
    generator: torch.Generator  # on the batch's device; draws times and noise


class Loss(NamedTuple):
    """Weighted losses and extra values to log."""

    per_sample: Tensor  # [B]
    sigma: Tensor  # [B], each sample's (larger) noise level
    scalars: Mapping[str, float] = {}


class Method(Params):
    """A training method: its fields are its hyperparameters, `loss` is the paper's algorithm.

    Every method has a `kind` and a `form` (how the raw network becomes the model, see ModelSpec), fixed or a field; one
    that compares images has a field `distance`. Methods override the hooks below where they differ from the defaults.
    """

    kind: str
    starts_from: ClassVar[Literal["teacher", "random"]] = "random"
    """The student's default initial weights, where the recipe has no base."""
    needs_base: ClassVar[bool] = False
    """Whether the loss uses the base, the consistency function that the student starts from."""
    forward_mode: ClassVar[bool] = False
    """Whether the loss takes forward-mode derivatives of the network."""

    @model_validator(mode="after")
    def _guides_a_teacher(self) -> "Method":
        allowed = getattr(self, "guidance_range", None)
        if allowed is None:
            return self
        check_weight(getattr(self, "guidance", 1.0), allowed)
        if not self.needs_teacher:
            low, high = allowed
            raise ValueError(
                f"guidance_range=[{low:g}, {high:g}] guides a teacher, and kind={self.kind} follows none with these "
                "settings; set distil=true, or a solver for ect"
            )
        return self

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return the losses of one batch, each computed from its own row of the networks' outputs (parallel/ranks.py).

        A network that gets several rows per image gets them adjacent.
        """
        raise TypeError(f"{type(self).__name__} defines no loss")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss uses a teacher."""
        return False

    @property
    def batch_multiple(self) -> int:
        """What the batch size must be a multiple of: rows that belong together."""
        return 1

    def target_decay_at(self, step: int, num_steps: int) -> float:
        """Return the target EMA's decay mu after `step`; 0 means that the target is the student itself."""
        return 0.0

    @property
    def keeps_target(self) -> bool:
        """Whether an EMA of the student is kept as regression target."""
        return False

    def build_weighting(self) -> nn.Module | None:
        """Return the learned part of the loss, sigma [B] -> log-weight [B], trained with the student."""
        return None

    @property
    def cycle(self) -> int:
        """Steps of a cycle, the first of which trains the student and the others a critic; 1: there is no critic."""
        return 1

    def trains_student_at(self, step: int) -> bool:
        """Whether `step` trains the student, and not the critic."""
        return step % self.cycle == 0

    def check_network(self, net: nn.Module) -> None:
        """Raise ValueError if the method cannot train this kind of network."""

    def build_discriminator(self, teacher: Precond, image_shape: tuple[int, ...]) -> Precond | None:
        """Return the critic's discriminator on a teacher's features; None if there is none."""
        return None

    @property
    def replaces_teacher(self) -> bool:
        """Whether the student replaces the teacher during training."""
        return False

    def replaces_teacher_at(self, step: int, num_steps: int) -> bool:
        """Whether it does so before `step`; optimiser and EMAs are then reset."""
        return False

    def learning_rate_factor(self, step: int, num_steps: int) -> float:
        """Return the method's own learning-rate schedule, a factor."""
        return 1.0

    def euler_steps_at(self, step: int, num_steps: int) -> int:
        """Return the number of Euler steps of a student of form euler after `step` training steps."""
        return 1


class LogWeight(nn.Module):
    """A learned weight of noise levels: random Fourier features of ln(sigma) / 4 and a linear layer (EDM2, 2312.02696).

    exp(w) * error - w is minimal where exp(-w) is the mean error of the level, so all levels get equal weight.
    `gain` scales the features, and with them how far a step of the optimiser moves w.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, gain: float = math.sqrt(2)) -> None:
        super().__init__()
        self.gain = gain
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(FEATURES))
        self.register_buffer("phases", 2 * math.pi * torch.rand(FEATURES))
        self.linear = nn.Linear(FEATURES, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, sigma: Tensor) -> Tensor:  # [B] -> [B]
        features = self.gain * torch.cos(sigma.log()[:, None] / 4 * self.frequencies + self.phases)
        return self.linear(features).squeeze(1)


def weighted(error: Tensor, log_weight: Tensor) -> Tensor:
    """Return errors [B] under a learned log-weight [B] (EDM2, eq. 21; sCM, eq. 11)."""
    return log_weight.exp() * error - log_weight


@functools.lru_cache(maxsize=8)
def grid_on(noise: Noise, num_scales: int, device: torch.device) -> Tensor:
    """Return the Karras grid on `device`, float32 [N]; computed in float64 and moved once."""
    return noise.grid(num_scales).to(device, torch.float32)


def draw_eps(x0: Tensor, generator: torch.Generator) -> Tensor:
    """Return unit Gaussian noise of x0's shape, [B, ...]."""
    return torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)


def teacher_of(models: Models, batch: Batch, guidance: float) -> Denoiser:
    """Return the teacher as a function of (x, sigma), with the batch's labels, and its weights of guidance if any."""
    assert models.teacher is not None, "the caller loads the teacher that the method needs"
    weight = guidance if batch.guidance is None else batch.guidance
    return functools.partial(guided(models.teacher, weight), labels=batch.labels)


def conditioned(model: Precond, batch: Batch) -> Denoiser:
    """Return a network with the student's inputs as a function of (x, sigma) at the batch's labels and weights."""
    return lambda x, sigma: model(x, sigma, *batch.conditions)


def consistency_distance(
    models: Models, batch: Batch, context: StepContext, *, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor
) -> Tensor:
    """Return d(f(x_t, t), stopgrad f_target(x_r, r)) under one dropout mask, [B] (CM, eq. 7)."""
    x0_hat = models.student(x_t, t, *batch.conditions)
    with torch.no_grad():
        target = models.target(x_r, r, *batch.conditions)
    assert models.distance is not None, "the caller builds method.distance"
    return models.distance(x0_hat, target)
