"""Zero-shot editing with a consistency model: inpaint, repaint, denoise, interpolate (CM, 2303.01469, Algorithm 4).

An edit is an orthogonal map A of the image and a mask of the coefficients to invent; the others are known.
Differs from the paper's code, which starts from another noise level: x ~ N(y, t_1^2 I), as the algorithm says.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cm_core.noise import Noise
from cm_core.sampling import check_levels
from cm_core.solvers import Denoiser

LUMINANCE = (0.2989, 0.5870, 0.1140)  # of red, green, blue (CM, App. D)
STROKE_SIGMAS = (5.38, 2.24)  # (CM, App. D, after SDEdit, 2108.01073)


class Draws(Protocol):
    """A source of noise per image: sampling.ImageNoise or InterpolatedNoise."""

    def draw(self) -> Tensor:
        """Return fresh unit Gaussian noise, [B, C, H, W]."""


@dataclass(frozen=True)
class Operator:
    """An orthogonal map A of images and the coefficients to invent, Omega; the others are known (CM, App. D)."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    unknown: Tensor  # bool, broadcasts against the coefficients

    def combine(self, known: Tensor, invented: Tensor) -> Tensor:
        """Return the image with the known coefficients of one image and the unknown ones of another, [B, C, H, W]."""
        return self.inverse(torch.where(self.unknown, self.forward(invented), self.forward(known)))

    def given(self, y: Tensor) -> Tensor:
        """Return images y with their unknown coefficients set to zero, [B, C, H, W]."""
        return self.combine(y, torch.zeros_like(y))


def inpaint(mask: Tensor) -> Operator:
    """Invent the pixels where `mask` [H, W] is true; A is the identity."""
    return Operator(_unchanged, _unchanged, mask)


def colorize(*, device: torch.device | str = "cpu") -> Operator:
    """Invent the two chroma coefficients of RGB images; keep the luminance."""
    q = orthogonal(LUMINANCE).to(device)
    return Operator(
        forward=lambda x: torch.einsum("bchw,ck->bkhw", x, q.to(x.dtype)),
        inverse=lambda coefficients: torch.einsum("bkhw,ck->bchw", coefficients, q.to(coefficients.dtype)),
        unknown=_all_but_first(3, device)[:, None, None],
    )


def superres(factor: int, *, device: torch.device | str = "cpu") -> Operator:
    """Invent all but the mean of each patch of factor x factor pixels, per channel."""
    q = orthogonal((1.0,) * factor**2).to(device)
    return Operator(
        forward=lambda x: to_patches(x, factor) @ q.to(x.dtype),
        inverse=lambda coefficients: from_patches(coefficients @ q.T.to(coefficients.dtype), factor),
        unknown=_all_but_first(factor**2, device),
    )


def orthogonal(direction: Sequence[float]) -> Tensor:
    """Return an orthogonal matrix whose first column is `direction`, all positive, normalised; float64 [n, n].

    QR of the identity with that column, its sign corrected (CM, App. D).
    """
    matrix = torch.eye(len(direction), dtype=torch.float64)
    matrix[:, 0] = torch.tensor(direction, dtype=torch.float64)
    q, _ = torch.linalg.qr(matrix)
    return q if q[:, 0].sum() > 0 else -q


def to_patches(x: Tensor, factor: int) -> Tensor:
    """Cut [B, C, H, W] into patches, [B, C, H / factor, W / factor, factor^2]; ValueError if a side does not divide."""
    batch, channels, height, width = x.shape
    if height % factor or width % factor:
        raise ValueError(f"factor {factor} does not divide images of {width}x{height} pixels")
    cut = x.reshape(batch, channels, height // factor, factor, width // factor, factor)
    return cut.transpose(3, 4).flatten(4)


def from_patches(patches: Tensor, factor: int) -> Tensor:
    """Invert `to_patches`."""
    batch, channels, rows, columns, _ = patches.shape
    cut = patches.reshape(batch, channels, rows, columns, factor, factor)
    return cut.transpose(3, 4).reshape(batch, channels, rows * factor, columns * factor)


def to_grey(x: Tensor) -> Tensor:
    """Return RGB images without their colours, [B, 3, H, W]: the input of colourisation."""
    weights = torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)
    luminance = torch.einsum("bchw,c->bhw", x, weights / weights.sum())
    return luminance[:, None].expand_as(x).clone()


def _all_but_first(count: int, device: torch.device | str) -> Tensor:
    return torch.arange(count, device=device) > 0


def _unchanged(x: Tensor) -> Tensor:
    return x


def fill_in(
    f: Denoiser,
    noise: Draws,
    y: Tensor,  # [B, C, H, W] in -1..1; its unknown coefficients are ignored
    operator: Operator,
    sigmas: Sequence[float],
    *,
    sigma_min: float,
) -> Tensor:
    """Invent the unknown coefficients of images y at decreasing `sigmas`, one network call each (CM, Algorithm 4).

    The known coefficients remain those of y, even if pixels then leave -1..1. The paper's last level, sigma_min, adds
    no noise and needs no call. Raises ValueError unless the levels decrease and stay above sigma_min.
    """
    start = operator.given(y)
    return _walk(f, noise, start, sigmas, sigma_min=sigma_min, keep=lambda x: operator.combine(start, x))


def repaint(f: Denoiser, noise: Draws, y: Tensor, sigmas: Sequence[float], *, sigma_min: float) -> Tensor:
    """Return images guided by y, such as strokes, keeping what survives noise of the first level (SDEdit)."""
    return _walk(f, noise, y, sigmas, sigma_min=sigma_min)


def denoise(f: Denoiser, noise: Draws, x: Tensor, sigmas: Sequence[float], *, sigma_min: float) -> Tensor:
    """Return clean images of x, whose noise has standard deviation sigmas[0]; later levels add noise again."""
    return _walk(f, noise, x, sigmas, sigma_min=sigma_min, noisy=True)


def interpolate_samples(
    f: Denoiser, a: Draws, b: Draws, weights: Tensor, sigmas: Sequence[float], *, sigma_min: float
) -> Tensor:
    """Return samples that interpolate from noise a's sample, weight 0, to noise b's, weight 1, [F, C, H, W].

    The end points are the images that `multistep` draws at the same levels.
    """
    return _walk(f, InterpolatedNoise(a, b, weights), torch.zeros(()), sigmas, sigma_min=sigma_min)


def interpolate_images(
    f: Denoiser,
    noise: Draws,  # of a single image
    a: Tensor,  # [1, C, H, W]
    b: Tensor,
    weights: Tensor,  # [F] in 0..1
    sigmas: Sequence[float],
    *,
    sigma_min: float,
) -> Tensor:
    """Return images that interpolate between two, [F, C, H, W], keeping what survives noise of the first level.

    Both get the same noise, so that the great circle between the noisy images keeps their noise level.
    """
    frames = SharedNoise(noise, len(weights))
    eps = sigmas[0] * frames.draw()
    return _walk(f, frames, slerp(a + eps, b + eps, weights), sigmas, sigma_min=sigma_min, noisy=True)


def _walk(
    f: Denoiser,
    noise: Draws,
    start: Tensor,
    sigmas: Sequence[float],
    *,
    sigma_min: float,
    keep: Callable[[Tensor], Tensor] = _unchanged,
    noisy: bool = False,
) -> Tensor:
    """Add and remove noise at each level; `keep` restores the known part, `noisy` input skips the first noise."""
    check_levels(sigmas, sigma_min=sigma_min)
    x = start
    for position, sigma in enumerate(sigmas):
        if position > 0 or not noisy:
            # An estimate is already a sample at level sigma_min: add only the rest of the variance.
            std = sigma if position == 0 else math.sqrt(sigma**2 - sigma_min**2)
            x = x + std * noise.draw()
        level = torch.full((len(x),), sigma, device=x.device)
        x = keep(f(x, level).clamp(-1, 1))
    return x


def filling_sigmas(levels: Noise, num_steps: int) -> list[float]:
    """Return the levels for `fill_in`: a Karras grid from sigma_max, without its last point sigma_min."""
    return levels.grid(num_steps + 1).tolist()[:-1]


def falling_sigmas(levels: Noise, sigma: float, num_steps: int) -> list[float]:
    """Return levels down from `sigma` by the constant ratio of the paper's pair for strokes.

    Raises ValueError if they leave the model's range.
    """
    ratio = STROKE_SIGMAS[1] / STROKE_SIGMAS[0]
    sigmas = [sigma * ratio**step for step in range(num_steps)]
    if not levels.sigma_min < sigmas[-1] <= sigmas[0] <= levels.sigma_max:
        words = " to ".join(f"{level:g}" for level in dict.fromkeys((sigmas[0], sigmas[-1])))
        allowed = f"above sigma_min={levels.sigma_min:g} and up to sigma_max={levels.sigma_max:g}"
        raise ValueError(f"noise levels must lie {allowed}, got {words}")
    return sigmas


class InterpolatedNoise:
    """Noise on the great circle between two images' noises, one frame per entry of `weights`, at every draw."""

    def __init__(self, a: Draws, b: Draws, weights: Tensor) -> None:
        self.a, self.b, self.weights = a, b, weights

    def draw(self) -> Tensor:
        """Return the noise of every frame, [F, C, H, W]; weight 0 is the first image's, 1 the second's."""
        shape = (len(self.weights), -1, -1, -1)
        return slerp(self.a.draw().expand(shape), self.b.draw().expand(shape), self.weights)


class SharedNoise:
    """One image's noise for several frames, which then differ by their starting points alone."""

    def __init__(self, noise: Draws, count: int) -> None:
        self.noise, self.count = noise, count

    def draw(self) -> Tensor:
        """Return the same fresh noise for every frame, [F, C, H, W]."""
        return self.noise.draw().expand(self.count, -1, -1, -1)


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Interpolate from a to b, [B, ...], along each sample's great circle, by weight [B] in 0..1 (CM, App. D).

    The norm stays that of noise; a straight line would shorten it, and serves only parallel samples (no great circle).
    """
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()
    weight, straight = weight.to(angle), angle.sin() < 1e-6
    sine = torch.where(straight, 1.0, angle.sin())
    of_a = torch.where(straight, 1 - weight, ((1 - weight) * angle).sin() / sine)
    of_b = torch.where(straight, weight, (weight * angle).sin() / sine)
    return (of_a[:, None] * flat_a + of_b[:, None] * flat_b).to(a.dtype).reshape(a.shape)
