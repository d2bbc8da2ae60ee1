"""Unit weight vectors and their gradients, each by one kernel that reads and writes any precision."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cm_core.networks.kernels.layout import TILE, WARPS
from cm_core.networks.magnitude import EPS


def unit_weight(weight: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `weight` [out, ...] in `dtype`, each vector scaled to length 1, times `gain` [1]."""
    return _UnitWeight.apply(weight, gain, dtype)


def force_unit_rms(weight: Tensor) -> None:
    """Scale each vector of `weight` [out, ...] to root mean square 1, in place."""
    if weight.numel():  # a rank may have no rows of a small weight
        _scaled(weight, None, weight, 1.0)


class _UnitWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight, gain)
        out = torch.empty_like(weight, dtype=dtype)  # in the weight's memory layout, where vectors are contiguous
        _scaled(weight, gain, out, 1 / math.sqrt(weight[0].numel()))
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain = ctx.saved_tensors
        dy, dw = _laid_out_as(weight, dy), torch.empty_like(weight)
        of_rows = weight.new_empty(len(weight), dtype=torch.float32)
        size = weight[0].numel()
        _unit_weight_backward_kernel[(len(weight),)](
            *(weight, gain, dy, dw, of_rows, size, math.sqrt(size), EPS),
            has_gain=gain is not None,
            tile=min(TILE, triton.next_power_of_2(size)),
            num_warps=WARPS,
        )
        return dw, None if gain is None else of_rows.sum().to(gain.dtype).view_as(gain), None


def _scaled(weight: Tensor, gain: Tensor | None, out: Tensor, factor: float) -> None:
    """Write to `out` the weight with vectors of root mean square `factor` times the gain."""
    size = weight[0].numel()
    _unit_weight_kernel[(len(weight),)](
        *(weight, gain, out, size, math.sqrt(size), factor, EPS),
        has_gain=gain is not None,
        tile=min(TILE, triton.next_power_of_2(size)),
        num_warps=WARPS,
    )


def _laid_out_as(like: Tensor, dy: Tensor) -> Tensor:
    """Return a gradient in the memory layout of its weight; strides of axes with a single element mean nothing."""
    strides = zip(dy.shape, dy.stride(), like.stride(), strict=True)
    if all(size == 1 or found == wanted for size, found, wanted in strides):
        return dy
    return torch.empty_like(like, dtype=dy.dtype).copy_(dy)


@triton.jit
def _unit_weight_kernel(
    weight_ptr, gain_ptr, out_ptr, size, root, factor, eps, has_gain: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * size
    squares = tl.zeros([tile], tl.float32)
    for past in range(0, size, tile):  # the second loop finds in the cache what this one read
        place = past + tl.arange(0, tile)
        w = tl.load(weight_ptr + start + place, mask=place < size, other=0.0).to(tl.float32)
        squares += w * w
    scale = factor / (tl.sqrt(tl.sum(squares, 0)) / root + eps)
    if has_gain:
        scale *= tl.load(gain_ptr).to(tl.float32)
    for past in range(0, size, tile):
        place = past + tl.arange(0, tile)
        w = tl.load(weight_ptr + start + place, mask=place < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + start + place, (w * scale).to(out_ptr.dtype.element_ty), mask=place < size)


@triton.jit
def _unit_weight_backward_kernel(
    weight_ptr, gain_ptr, dy_ptr, dw_ptr, d_gain_ptr, size, root, eps, has_gain: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * size
    squares, products = tl.zeros([tile], tl.float32), tl.zeros([tile], tl.float32)
    for past in range(0, size, tile):
        place = past + tl.arange(0, tile)
        w = tl.load(weight_ptr + start + place, mask=place < size, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + place, mask=place < size, other=0.0).to(tl.float32)
        squares += w * w
        products += w * dy
    norm = tl.sqrt(tl.sum(squares, 0))
    divisor = norm + eps * root  # y = w * gain / divisor
    along = tl.sum(products, 0) / divisor
    scale = 1.0 / divisor
    if has_gain:
        tl.store(d_gain_ptr + tl.program_id(0), along)
        scale *= tl.load(gain_ptr).to(tl.float32)
    along = tl.where(norm > 0, along / norm, 0.0)  # PyTorch's norm has the gradient 0 at 0
    for past in range(0, size, tile):
        place = past + tl.arange(0, tile)
        w = tl.load(weight_ptr + start + place, mask=place < size, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start + place, mask=place < size, other=0.0).to(tl.float32)
        dw = (dy - w * along) * scale
        tl.store(dw_ptr + start + place, dw.to(dw_ptr.dtype.element_ty), mask=place < size)
