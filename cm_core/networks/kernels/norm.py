"""Group norm with SiLU, of a sum with a bias and an embedding, over one tensor or two separate ones.

PyTorch's group norm wants channels first and copies in and out; here a program holds all pixels of some whole groups of
one image in registers, or reads larger ones twice. A decoder's input, the features from below and the encoder's skip
connection, is read without concatenation.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from cm_core.networks.kernels.layout import (
    TILE,
    WARPS,
    channels_last,
    empty_channels_last,
    pixel_stride,
    row_stride,
    sum_rows,
)
from cm_core.networks.kernels.norm_device import norm_backward, norm_forward

CHANNELS = 32  # per program, rounded to whole groups: 64 bytes of bf16
HELD = {1: 32_768, 2: 16_384}  # maximum of pixels times channels per program, with one array and with two
EACH = {1: 64, 2: 32}  # of them per thread


def norm_act(
    x: Tensor,  # [B, C, H, W]
    *,
    groups: int,
    eps: float,
    scale: Tensor,  # [C] or [B, C]
    shift: Tensor,  # [C] or [B, C]
    silu: bool,
    bias: Tensor | None = None,  # [C], added to every pixel first
    before: Tensor | None = None,  # [B, C], added to every pixel of its image
    beside: Tensor | None = None,  # [B, C - c, H, W] if x has only the first c channels
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return act(group_norm(x + bias + before) * scale + shift) in x's dtype, channels last; and x and beside again.

    Use the returned x and beside downstream; the backward kernel then accumulates both gradients.
    """
    return _NormAct.apply(x, beside, bias, before, scale, shift, groups, eps, silu)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beside: Tensor | None,
        bias: Tensor | None,
        before: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        groups: int,
        eps: float,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        passed = x, beside
        x, beside = channels_last(x), None if beside is None else channels_last(beside)
        before = None if before is None else before.contiguous()
        scale, shift = scale.contiguous(), shift.contiguous()
        y, mean, rstd = _normed(x, beside, bias, before, scale, shift, groups, eps, silu)
        ctx.save_for_backward(x, beside, bias, before, scale, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        ctx.set_materialize_grads(False)
        return y, *passed

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *d_passed: Tensor | None) -> tuple[Tensor | None, ...]:
        x, beside, bias, before, scale, shift, mean, rstd = ctx.saved_tensors
        passes = any(d is not None for d in d_passed)
        if passes:
            d_passed = tuple(_passed(d, t) for d, t in zip(d_passed, (x, beside), strict=True))
        dy, shape = channels_last(dy), _NormShape(x, beside, ctx.groups, arrays=2)
        dx, d_beside = (None if t is None else empty_channels_last(t, *t.shape[1:]) for t in (x, beside))
        added = bias is not None or before is not None
        of_images = x.new_empty(2 + added, len(x), shape.channels, dtype=torch.float32)
        d_scale, d_shift, d_before = of_images[0], of_images[1], of_images[-1]  # the last is written if `added`
        norm_backward[shape.grid](
            *(x, beside, bias, before, scale, shift, mean, rstd, dy, *d_passed),
            *(dx, d_beside, d_before, d_scale, d_shift, *shape.sizes),
            *(pixel_stride(t) for t in (x, beside, dy, *d_passed)),
            row_stride(scale),
            has_bias=bias is not None,
            has_before=before is not None,
            passes=passes,
            tangent=False,
            silu=ctx.silu,
            **shape.tiles,
        )
        sums = sum_rows(of_images if scale.ndim == 1 else of_images[2:])
        if scale.ndim == 1:
            d_scale, d_shift = sums[0], sums[1]
        d_bias = None if bias is None else sums[-1].to(bias.dtype)
        d_before = None if before is None else d_before.to(before.dtype)
        return dx, d_beside, d_bias, d_before, d_scale.to(scale.dtype), d_shift.to(shift.dtype), None, None, None


def norm_act_forward_mode(
    x: Tensor,  # [B, C, H, W]
    *,
    groups: int,
    eps: float,
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    silu: bool,
) -> Tensor:
    """Return act(group_norm(x) * scale + shift) in x's dtype, channels last, with its derivative along x's tangent.

    There are no gradients, and scale and shift have no tangents.
    """
    return _NormActForwardMode.apply(x, scale.detach(), shift.detach(), groups, eps, silu)[0]


class _NormActForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _normed(channels_last(x), None, None, None, scale, shift, groups, eps, silu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, scale, shift, ctx.groups, _, ctx.silu = inputs
        ctx.save_for_forward(x, scale, shift, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> tuple[Tensor, None, None]:
        x, scale, shift, mean, rstd = ctx.saved_tensors
        x, dx = channels_last(x), channels_last(dx)
        shape, dy = _NormShape(x, None, ctx.groups, arrays=2), empty_channels_last(x, *x.shape[1:])
        norm_backward[shape.grid](
            *(x, None, None, None, scale, shift, mean, rstd, dx, None, None),
            *(dy, None, None, None, None, *shape.sizes),
            *(pixel_stride(x), 0, pixel_stride(dx), 0, 0, 0),
            has_bias=False,
            has_before=False,
            passes=False,
            tangent=True,
            silu=ctx.silu,
            **shape.tiles,
        )
        return dy, None, None


def _normed(
    x: Tensor,
    beside: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm's output, and the means and inverse deviations of its groups, [B, groups]."""
    shape = _NormShape(x, beside, groups, arrays=1)
    y = empty_channels_last(x, shape.channels, *x.shape[2:])
    mean, rstd = x.new_empty(2, len(x), groups, dtype=torch.float32)
    norm_forward[shape.grid](
        *(x, beside, bias, before, scale, shift, y, mean, rstd),
        *(*shape.sizes, pixel_stride(x), pixel_stride(beside), row_stride(scale), eps),
        has_bias=bias is not None,
        has_before=before is not None,
        silu=silu,
        **shape.tiles,
    )
    return y, mean, rstd


def _passed(d: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Return the gradient of a tensor that a norm passes on: zeros if it is unused, None if there was no tensor."""
    if like is None:
        return None
    return torch.zeros_like(like) if d is None else channels_last(d)


class _NormShape:
    """Partition of a norm's images among programs: the grid, the kernel's sizes and tiles.

    `arrays` is the number of values per pixel and channel that a program needs: x, or x and a gradient.
    """

    def __init__(self, x: Tensor, beside: Tensor | None, groups: int, *, arrays: int) -> None:
        images, first, height, width = x.shape
        self.channels = first + (0 if beside is None else beside.shape[1])
        pixels, group_size = triton.next_power_of_2(height * width), self.channels // groups
        wanted = min(CHANNELS, max(CHANNELS // 2, HELD[arrays] // pixels))
        if arrays == 1 and (CHANNELS // 2) % group_size == 0:
            wanted = CHANNELS // 2  # the fastest choice where so few are whole groups
        groups_each = max(1, min(groups, wanted // group_size))
        tile_width = triton.next_power_of_2(groups_each * group_size)
        picks = beside is not None and first % (groups_each * group_size) == 0
        whole = pixels * tile_width <= HELD[arrays]
        tile_height = pixels if whole else max(1, TILE // tile_width)
        fits = pixels == height * width and tile_width == groups_each * group_size and groups % groups_each == 0
        self.grid = (triton.cdiv(groups, groups_each), images)
        self.sizes = (height * width, self.channels, first, groups)
        self.tiles = {
            "picks": picks,
            "mixes": beside is not None and not picks,
            "whole": whole,
            "full": whole and fits,
            "group_size": group_size,
            "groups_each": groups_each,
            "width": tile_width,
            "height": tile_height,
            "group_width": triton.next_power_of_2(groups_each),
            "num_warps": max(1, tile_height * tile_width // (32 * EACH[arrays])) if whole else WARPS,
        }
