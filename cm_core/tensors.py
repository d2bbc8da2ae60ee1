"""Small tensor helpers: broadcasting of per-sample scalars, pixels to and from [-1, 1]."""

import torch
from torch import Tensor


def expand_like(v: Tensor, x: Tensor) -> Tensor:
    """Append axes to `v` [B] until it broadcasts against `x` [B, ...]."""
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


def from_pixels(pixels: Tensor) -> Tensor:
    """Map uint8 [B, H, W, C] in 0..255 to float32 [B, C, H, W] in -1..1."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_inputs(stored: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Map what a data set stores to what networks see, float32 [B, C, H, W] of standard deviation about 0.5.

    Images are uint8 [B, H, W, C]. Latents are float32 [B, 2, C, h, w], mean and standard deviation of their posterior,
    from which `generator` draws; without one their mean is returned.
    """
    if stored.dtype == torch.uint8:
        return from_pixels(stored)
    mean, std = stored.unbind(1)
    if generator is None:
        return mean
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)


def to_pixels(x: Tensor) -> Tensor:
    """Map float [B, C, H, W] to uint8 [B, H, W, C]: clip to -1..1, round to nearest (EDM's rule, x * 127.5 + 128)."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
