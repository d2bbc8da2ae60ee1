"""Shared parts of the methods: their interface and the consistency loss between two points of a trajectory."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cm_core.guidance import guided
from cm_core.networks.modes import forward_mode_attention
from cm_core.noise import Noise
from cm_core.params import Params
from cm_core.solvers import Denoiser
from cm_core.types import Batch, Loss, Models, StepContext


class Method(Params):
    """A training method: its fields are its hyperparameters, `loss` is the paper's algorithm.

    Every method has a `kind` and a `form` (how the raw network becomes the model, see ModelSpec), fixed or a field; one
    that compares images has a field `distance`. Methods override the hooks below where they differ from the defaults.
    """

    kind: str
    starts_from: ClassVar[Literal["teacher", "random"]] = "random"
    """The student's default initial weights."""
    forward_mode: ClassVar[bool] = False
    """Whether the loss takes forward-mode derivatives of the network."""

    def loss(self, models: Models, batch: Batch, context: StepContext) -> Loss:
        """Return the losses of one batch, each computed from its own row of the networks' outputs (parallel/ranks.py).

        A network that gets several rows per image gets them adjacent.
        """
        raise TypeError(f"{type(self).__name__} defines no loss")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss uses a teacher."""
        return False

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


@functools.lru_cache(maxsize=8)
def grid_on(noise: Noise, num_scales: int, device: torch.device) -> Tensor:
    """Return the Karras grid on `device`, float32 [N]; computed in float64 and moved once."""
    return noise.grid(num_scales).to(device, torch.float32)


def draw_eps(x0: Tensor, generator: torch.Generator) -> Tensor:
    """Return unit Gaussian noise of x0's shape, [B, ...]."""
    return torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)


def teacher_of(models: Models, batch: Batch, guidance: float) -> Denoiser:
    """Return the teacher as a function of (x, sigma), with the batch's labels and guidance."""
    assert models.teacher is not None, "the caller loads the teacher that the method needs"
    return functools.partial(guided(models.teacher, guidance), labels=batch.labels)


def consistency_distance(
    models: Models, batch: Batch, context: StepContext, *, x_t: Tensor, t: Tensor, x_r: Tensor, r: Tensor
) -> Tensor:
    """Return d(f(x_t, t), stopgrad f_target(x_r, r)) under one dropout mask, [B] (CM, eq. 7)."""
    x0_hat = models.student(x_t, t, batch.labels)
    with torch.no_grad():
        target = models.target(x_r, r, batch.labels)
    assert models.distance is not None, "the caller builds method.distance"
    return models.distance(x0_hat, target)


def derivative(function: Callable[..., Tensor], primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    """Return a function's value and its derivative along `tangents`, by forward-mode differentiation."""
    with forward_mode_attention():
        found = torch.func.jvp(function, primals, tangents)
    return found[0], found[1]
