"""Classifier-free guidance (Ho and Salimans, 2207.12598)."""

from collections.abc import Callable

import torch
from torch import Tensor

LabelledDenoiser = Callable[..., Tensor]  # (x [B, ...], sigma [B], labels [B]) -> x0_hat
NO_LABEL = -1


def guided(denoiser: LabelledDenoiser, guidance: float) -> LabelledDenoiser:
    """Return D_uncond + guidance * (D_cond - D_uncond), which is the denoiser itself at 1.

    One pass of twice the batch computes both, an image's two rows adjacent: a split by rows must not separate them.
    The denoiser must have been trained with label dropout.
    """
    if guidance == 1:
        return denoiser

    def extrapolated(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        both = torch.stack([labels, torch.full_like(labels, NO_LABEL)], dim=1).flatten()
        found = denoiser(x.repeat_interleave(2, dim=0), sigma.repeat_interleave(2), both)
        with_label, without = found[0::2], found[1::2]
        return without + guidance * (with_label - without)

    return extrapolated
