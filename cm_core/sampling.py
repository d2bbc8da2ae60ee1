"""Sampling: the teacher's ODE and SDE samplers, consistency sampling (CM, Algorithm 1), steps of a flow map.

Noise is a function of (seed, index, draw): image i depends neither on the batch size nor on the device.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cm_core.guidance import Interval, LabelledDenoiser, autoguided, guided
from cm_core.noise import Noise
from cm_core.params import Params
from cm_core.philox import normals
from cm_core.randomness import derive_seed
from cm_core.solvers import Denoiser, euler_step, heun_step, slope
from cm_core.tensors import expand_like


class ImageNoise:
    """Unit Gaussian noise for a batch of images, independent per image."""

    def __init__(self, seed: int, indices: Sequence[int], image_shape: tuple[int, ...], device: torch.device) -> None:
        self.image_shape, self.device = image_shape, device
        self._seed, self._draws = derive_seed(seed, "image"), 0
        self._indices = torch.tensor(indices, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self._indices)

    def draw(self) -> Tensor:
        """Return fresh noise, [B, C, H, W]."""
        noise = _normals_for(self.device)(self._indices, self._draws, math.prod(self.image_shape), self._seed)
        self._draws += 1
        return noise.unflatten(1, self.image_shape)


def _normals_for(device: torch.device) -> Callable[[Tensor, int, int, int], Tensor]:
    if device.type != "cuda":
        return normals
    from cm_core.philox_kernel import normals as normals_by_kernel

    return normals_by_kernel


def multistep(
    f: Denoiser, noise: ImageNoise, sigmas: Sequence[float], *, sigma_min: float, clip: bool = True
) -> Tensor:
    """Sample a consistency model at decreasing `sigmas`, one network call each, [B, C, H, W] (CM, Alg. 1).

    One level is one-step sampling. Estimates are clipped to -1..1 unless they are latents, which have no such bounds:
    then `clip` is off. Raises ValueError unless the levels decrease and stay above sigma_min.
    """
    check_levels(sigmas, sigma_min=sigma_min)
    x = torch.zeros(len(noise), *noise.image_shape, device=noise.device)
    for position, sigma in enumerate(sigmas):
        # An estimate is already a sample at level sigma_min: add only the rest of the variance.
        std = sigma if position == 0 else math.sqrt(sigma**2 - sigma_min**2)
        level = torch.full((len(x),), sigma, device=x.device)
        x = _clipped(f(x + std * noise.draw(), level), clip)
    return x


def _clipped(x: Tensor, clip: bool) -> Tensor:
    return x.clamp(-1, 1) if clip else x


def euler_steps(denoiser: Denoiser, noise: ImageNoise, sigmas: Sequence[float], *, clip: bool = True) -> Tensor:
    """Sample a denoiser distilled to take one Euler step between consecutive `sigmas`, [B, C, H, W] (PD).

    The end is clipped to -1..1; for latents `clip` is off.
    """
    x = noise.draw().double() * sigmas[0]
    for t, r in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = euler_step(_in_float32(denoiser), x, *_levels(x, t, r))
    return _clipped(x.float(), clip)


def flow_map_steps(
    flow_map: Callable[..., Tensor], noise: ImageNoise, sigmas: Sequence[float], *, clip: bool = True
) -> Tensor:
    """Sample a flow map along its ODE from the first of decreasing `sigmas` to the next ones and 0, [B, C, H, W].

    Nothing adds noise again (MeanFlow). The end is clipped to -1..1; for latents `clip` is off. Raises ValueError
    unless the levels decrease and stay above 0.
    """
    check_levels(sigmas, sigma_min=0.0)
    x = sigmas[0] * noise.draw()
    for t, r in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        t_, r_ = _levels(x, t, r)
        x = flow_map(x, t_, to=r_)
    return _clipped(x, clip)


def check_levels(sigmas: Sequence[float], *, sigma_min: float) -> None:
    """Raise ValueError unless noise levels decrease and stay above sigma_min."""
    ordered = all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False))
    if not sigmas or not ordered or sigmas[-1] <= sigma_min:
        raise ValueError(f"noise levels must decrease and stay above sigma_min={sigma_min}, got {list(sigmas)}")


class TeacherSampler(Params):
    """Sampling of a denoiser along its ODE, or with churn along its SDE (EDM, Algorithms 1 and 2)."""

    solver: Literal["euler", "heun", "dpm2", "ancestral"] = "heun"
    """One step: Euler, Heun (EDM, Alg. 1), DPM-Solver-2-like midpoint, Euler with ancestral noise."""
    num_steps: int = Field(18, ge=2)
    """Noise levels n before the final 0; Heun calls the network 2n - 1 times (EDM: 18 on CIFAR-10)."""
    s_churn: float = Field(0.0, ge=0)
    """Noise added before each step, 0 for the ODE (EDM, Alg. 2: 40 on ImageNet-64)."""
    s_min: float = Field(0.0, ge=0)
    """Smallest level at which noise is added (EDM, Alg. 2)."""
    s_max: float = Field(1e9, gt=0)
    """Largest level at which noise is added (EDM, Alg. 2)."""
    s_noise: float = Field(1.0, gt=0)
    """Standard deviation of the added noise relative to what the level asks for (EDM, Alg. 2)."""
    guidance: float = Field(1.0, ge=0)
    """Weight of the label in classifier-free guidance, which doubles the network calls; 1: none (2207.12598).
    With a weaker model, the weight of the difference between the two (autoguidance, 2406.02507)."""
    guidance_interval: Interval | None = None
    """Noise levels low < sigma <= high at which guidance acts; empty: all (2404.07724)."""

    @model_validator(mode="after")
    def _guides_somewhere(self) -> "TeacherSampler":
        if self.guidance_interval is None:
            return self
        low, high = self.guidance_interval
        if not 0 <= low < high:
            raise ValueError(f"guidance_interval=[{low:g}, {high:g}] must be two noise levels, 0 <= low < high")
        if self.guidance == 1:
            raise ValueError(f"guidance_interval=[{low:g}, {high:g}] has no effect with guidance=1, which is none")
        return self

    @property
    def nfe(self) -> int:
        """Network calls per image."""
        calls = {"heun": 2 * self.num_steps - 1, "dpm2": 2 * self.num_steps}.get(self.solver, self.num_steps)
        return calls if self.guidance == 1 else 2 * calls

    def sample(
        self,
        denoiser: Denoiser | LabelledDenoiser,
        noise: ImageNoise,
        levels: Noise,
        labels: Tensor | None = None,
        *,
        weak: LabelledDenoiser | None = None,
    ) -> Tensor:
        """Return images, [B, C, H, W], from noise at sigma_max; the state is float64 (EDM, generate).

        Raises ValueError if guidance lacks labels [B], or a weaker denoiser in their place.
        """
        if weak is not None:
            denoiser = partial(autoguided(denoiser, weak, self.guidance, self.guidance_interval), labels=labels)
        elif labels is not None:
            denoiser = partial(guided(denoiser, self.guidance, self.guidance_interval), labels=labels)
        elif self.guidance != 1:
            raise ValueError(f"guidance={self.guidance} needs a model of labelled images")
        sigmas = [*levels.grid(self.num_steps).tolist(), 0.0]
        x = noise.draw().double() * sigmas[0]
        for t, r in zip(sigmas[:-1], sigmas[1:], strict=True):
            x, t = self._churn(x, t, noise)
            x = _SAMPLER_STEPS[self.solver](_in_float32(denoiser), x, t, r, noise)
        return x.float()

    def _churn(self, x: Tensor, sigma: float, noise: ImageNoise) -> tuple[Tensor, float]:
        if self.s_churn == 0 or not self.s_min <= sigma <= self.s_max:
            return x, sigma
        raised = sigma * (1 + min(self.s_churn / self.num_steps, math.sqrt(2) - 1))
        return x + math.sqrt(raised**2 - sigma**2) * self.s_noise * noise.draw().double(), raised


def _in_float32(denoiser: Denoiser) -> Denoiser:
    """Denoiser for a float64 sampler state: the network sees float32."""
    return lambda x, sigma: denoiser(x.float(), sigma.float()).double()


def _levels(x: Tensor, *sigmas: float) -> list[Tensor]:
    return [torch.full((len(x),), sigma, dtype=x.dtype, device=x.device) for sigma in sigmas]


def _euler(denoiser: Denoiser, x: Tensor, t: float, r: float, noise: ImageNoise) -> Tensor:
    return euler_step(denoiser, x, *_levels(x, t, r))


def _heun(denoiser: Denoiser, x: Tensor, t: float, r: float, noise: ImageNoise) -> Tensor:
    step = heun_step if r > 0 else euler_step  # the slope is undefined at 0
    return step(denoiser, x, *_levels(x, t, r))


def _dpm2(denoiser: Denoiser, x: Tensor, t: float, r: float, noise: ImageNoise) -> Tensor:
    """Full step with the slope at the midpoint of the cube roots (algorithm "dpm" of the CM code)."""
    middle = ((t ** (1 / 3) + r ** (1 / 3)) / 2) ** 3
    t_, middle_, r_ = _levels(x, t, middle, r)
    x_middle = euler_step(denoiser, x, t_, middle_)
    return x + expand_like(r_ - t_, x) * slope(denoiser, x_middle, middle_)


def _ancestral(denoiser: Denoiser, x: Tensor, t: float, r: float, noise: ImageNoise) -> Tensor:
    """Euler to a lower level than `r`, the rest of the variance as fresh noise."""
    up = math.sqrt(r**2 * (t**2 - r**2) / t**2)
    down = math.sqrt(r**2 - up**2)
    x = euler_step(denoiser, x, *_levels(x, t, down))
    return x + up * noise.draw().double() if up > 0 else x


_SAMPLER_STEPS: dict[str, Callable[[Denoiser, Tensor, float, float, ImageNoise], Tensor]] = {
    "euler": _euler,
    "heun": _heun,
    "dpm2": _dpm2,
    "ancestral": _ancestral,
}
