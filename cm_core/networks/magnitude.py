"""Layers that preserve the magnitude of what they are given: unit variance in, unit variance out (EDM2, 2312.02696).

Every weight vector has unit length, at use and, before each training step, in memory: the optimiser's steps then keep
their size relative to the weights, and the rate's schedule alone decides it.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cm_core.networks import modes
from cm_core.tensors import expand_like

SILU_GAIN = 0.596  # root mean square of SiLU of unit Gaussian noise (EDM2, section 2.5)
EPS = 1e-4  # beside norms in a division (EDM2)


def unit_rms(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Scale `x` to root mean square 1 over `dim`, in the dtype of `x`; the norm is taken in float32 at least."""
    if dim in (-1, x.ndim - 1) and modes.fuses(x):
        from cm_core.networks.kernels import unit_rows

        return unit_rows(x)
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    root = math.sqrt(math.prod([x.shape[d] for d in dims]))
    wide = x if x.dtype.itemsize >= 4 else x.float()
    norm = torch.linalg.vector_norm(wide, dim=dims, keepdim=True) / root + EPS
    return x / norm.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of unit gain (EDM2, eq. 81)."""
    return F.silu(x) / SILU_GAIN


def mp_modulated_silu(h: Tensor, factor: Tensor) -> Tensor:
    """Return mp_silu(h * factor) for h [B, C, H, W] and factor [B, C]."""
    if modes.fuses(h):
        from cm_core.networks import kernels

        return kernels.mp_modulated_silu(h, factor)
    return mp_silu(h * expand_like(factor, h).to(h.dtype))


def sum_factors(share: float) -> tuple[float, float]:
    """Return what `mp_sum` multiplies its summands by."""
    return (1 - share) / math.hypot(1 - share, share), share / math.hypot(1 - share, share)


def mp_sum(a: Tensor, b: Tensor, share: float, limit: float = math.inf) -> Tensor:
    """Return (1 - share) a + share b, scaled so that independent unit inputs give a unit sum (EDM2, eq. 88).

    Sums beyond +-limit are clipped.
    """
    if a.ndim == 4 and modes.fuses(a):
        from cm_core.networks import kernels

        return kernels.mp_sum(a, b, share, limit)
    total = torch.lerp(a, b.to(a.dtype), share) / math.hypot(1 - share, share)
    return total if limit == math.inf else total.clamp(-limit, limit)


def cat_factors(first: int, second: int) -> tuple[float, float]:
    """Return what `mp_cat` multiplies tensors of so many channels by."""
    return math.sqrt((first + second) / 2 / first), math.sqrt((first + second) / 2 / second)


def mp_cat(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate over channels so that `a` and `b` contribute equally, whatever their widths (EDM2, eq. 103)."""
    a_factor, b_factor = cat_factors(a.shape[1], b.shape[1])
    return torch.cat([a * a_factor, b * b_factor], dim=1)


def mp_fork(x: Tensor, beside: Tensor | None = None, *, normalised: bool = False) -> tuple[Tensor, Tensor]:
    """Return a block's main path, mp_cat(x, beside) or x, `normalised` over channels, and mp_silu of it: the branch."""
    if modes.fuses(x):
        from cm_core.networks import kernels

        return kernels.mp_fork(x, beside, normalised=normalised)
    x = x if beside is None else mp_cat(x, beside)
    x = unit_rms(x, 1) if normalised else x
    return x, mp_silu(x)


class MPConv(nn.Module):
    """Convolution of odd size `kernel`, or a linear layer (0), with unit weight vectors and no bias.

    `gain`: the output has a learned factor that starts at zero. Scalars of FSDP2 need an axis, so its shape is [1].
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, gain: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *((kernel, kernel) if kernel else ())))
        self.gain = nn.Parameter(torch.zeros(1)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        if modes.fuses(x):
            return self._fused(x)
        weight = unit_rms(self.weight, range(1, self.weight.ndim)) / math.sqrt(self.weight[0].numel())
        if self.gain is not None:
            weight = weight * self.gain
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def _fused(self, x: Tensor) -> Tensor:
        from cm_core.networks.kernels import unit_weight

        weight = unit_weight(self.weight, self.gain, modes.half_precision(x.device) or self.weight.dtype)
        if weight.ndim == 2:
            return F.linear(x, weight)
        if weight.shape[-1] == 1:  # a matmul over channels last
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def forced_weights(net: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights that `force_norm` is to keep at unit length; none for most networks."""
    return (module.weight for module in net.modules() if isinstance(module, MPConv))


@torch.no_grad()
def force_norm(weight: Tensor) -> None:
    """Scale each weight vector to root mean square 1, in place: what a step changed of its length is undone.

    `weight` [out, ...] may be some rows of a whole one.
    """
    if modes.fuses(weight):
        from cm_core.networks.kernels import force_unit_rms

        force_unit_rms(weight)
    else:
        weight.copy_(unit_rms(weight, range(1, weight.ndim)))
