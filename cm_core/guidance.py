"""Guidance: classifier-free (2207.12598), by a weaker model (autoguidance, 2406.02507), in an interval (2404.07724)."""

from collections.abc import Callable

import torch
from torch import Tensor

LabelledDenoiser = Callable[..., Tensor]  # (x [B, ...], sigma [B], labels [B]) -> x0_hat
Interval = tuple[float, float]  # noise levels low < sigma <= high at which guidance acts
WeightRange = tuple[float, float]  # guidance weights low <= w <= high that a student takes as an input (2210.03142)
NO_LABEL = -1


def check_weight(weight: float, allowed: WeightRange) -> None:
    """Raise ValueError unless `allowed` is a range of weights and `weight` lies in it."""
    low, high = allowed
    if not 0 <= low < high:
        raise ValueError(f"guidance_range=[{low:g}, {high:g}] must be two weights, 0 <= low < high")
    if not low <= weight <= high:
        raise ValueError(f"guidance={weight:g} lies outside guidance_range=[{low:g}, {high:g}]")


def guided(denoiser: LabelledDenoiser, guidance: float | Tensor, interval: Interval | None = None) -> LabelledDenoiser:
    """Return D_uncond + guidance * (D_cond - D_uncond), which is the denoiser itself at 1, and outside the interval.

    `guidance` is one weight, or one for each image, [B]. One pass of twice the batch computes both denoisers, an
    image's two rows adjacent: a split by rows must not separate them. The denoiser must have been trained with label
    dropout.
    """
    if not isinstance(guidance, Tensor) and guidance == 1:
        return denoiser

    def extrapolated(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        both = torch.stack([labels, torch.full_like(labels, NO_LABEL)], dim=1).flatten()
        found = denoiser(x.repeat_interleave(2, dim=0), sigma.repeat_interleave(2), both)
        with_label, without = found[0::2], found[1::2]
        return without + _weight(guidance, interval, sigma, x) * (with_label - without)

    return extrapolated


def autoguided(
    denoiser: LabelledDenoiser, weak: LabelledDenoiser, guidance: float, interval: Interval | None = None
) -> LabelledDenoiser:
    """Return D_weak + guidance * (D - D_weak) of the same labels, which is D itself at 1, and outside the interval.

    The weak denoiser is a smaller or less trained one of the same images.
    """
    if guidance == 1:
        return denoiser

    def extrapolated(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        without = weak(x, sigma, labels)
        return without + _weight(guidance, interval, sigma, x) * (denoiser(x, sigma, labels) - without)

    return extrapolated


def _weight(guidance: float | Tensor, interval: Interval | None, sigma: Tensor, x: Tensor) -> Tensor | float:
    """Return each sample's weight, which broadcasts against x."""
    if interval is not None:
        guidance = torch.where((interval[0] < sigma) & (sigma <= interval[1]), guidance, 1.0)
    if not isinstance(guidance, Tensor):
        return guidance
    return guidance.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
