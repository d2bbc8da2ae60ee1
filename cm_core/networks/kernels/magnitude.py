"""EDM2's activations: what begins a block, its modulation, its sums; a row is the channels of a pixel."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cm_core.networks.kernels.layout import TILE, WARPS, channels_last, empty_channels_last, pixel_stride, sum_rows
from cm_core.networks.kernels.norm_device import load_pixels, sigmoid, silu_slope, store_pixels
from cm_core.networks.magnitude import EPS, SILU_GAIN, cat_factors, sum_factors

MODULATION_ROWS = 256  # pixels per program that sums the gradients of a modulation
LANES = 128  # channels per program of a modulation at most


def mp_fork(x: Tensor, beside: Tensor | None, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """Return mp_cat(x, beside), of unit root mean square over channels if `normalised`, and mp_silu of it.

    Use both downstream; the backward kernel then accumulates their gradients.
    """
    return _Fork.apply(x, beside, normalised, True)


def unit_rows(x: Tensor) -> Tensor:
    """Scale `x` to root mean square 1 over its last axis."""
    rows = x.reshape(-1, x.shape[-1], 1, 1)
    return _Fork.apply(rows, None, True, False)[0].reshape(x.shape)


def mp_modulated_silu(h: Tensor, factor: Tensor) -> Tensor:
    """Return mp_silu(h * factor) for h [B, C, H, W] and factor [B, C], channels last."""
    return _Modulation.apply(h, factor)


def mp_sum(a: Tensor, b: Tensor, share: float, limit: float) -> Tensor:
    """Return the magnitude-preserving sum of [B, C, H, W], clipped to +-limit, channels last."""
    return _Sum.apply(a, b, *sum_factors(share), limit)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, beside: Tensor | None, normalised: bool, activates: bool
    ) -> tuple[Tensor, Tensor | None]:
        given, x, beside = x, channels_last(x), None if beside is None else channels_last(beside)
        shape = _RowShape(x, beside, normalised)
        main, act = (
            empty_channels_last(x, shape.channels, *x.shape[2:]) if wanted else None
            for wanted in (normalised or beside is not None, activates)
        )
        _fork_kernel[shape.grid](
            *(x, beside, main, act, *shape.sizes, pixel_stride(x), pixel_stride(beside)),
            stores_main=main is not None,
            activates=activates,
            **shape.options,
        )
        ctx.save_for_backward(x, beside)
        ctx.normalised = normalised
        ctx.set_materialize_grads(False)
        return given if main is None else main, act

    @staticmethod
    def backward(ctx: Any, d_main: Tensor | None, d_act: Tensor | None) -> tuple[Tensor | None, ...]:
        x, beside = ctx.saved_tensors
        d_main, d_act = (None if d is None else channels_last(d) for d in (d_main, d_act))
        dx, d_beside = (None if t is None else empty_channels_last(t, *t.shape[1:]) for t in (x, beside))
        shape = _RowShape(x, beside, ctx.normalised)
        _fork_backward_kernel[shape.grid](
            *(x, beside, d_main, d_act, dx, d_beside, *shape.sizes),
            *(pixel_stride(t) for t in (x, beside, d_main, d_act, dx, d_beside)),
            has_main=d_main is not None,
            has_act=d_act is not None,
            **shape.options,
        )
        return dx, d_beside, None, None


class _RowShape:
    """The rows of a fork: the grid, the kernels' sizes and their options."""

    def __init__(self, x: Tensor, beside: Tensor | None, normalised: bool) -> None:
        first, second = x.shape[1], 0 if beside is None else beside.shape[1]
        self.channels, rows = first + second, x.numel() // first
        factors = cat_factors(first, second) if second else (1.0, 1.0)
        width = triton.next_power_of_2(self.channels)
        height = max(1, TILE // width)
        self.grid = (triton.cdiv(rows, height),)
        self.sizes = (rows, self.channels, first, *factors, math.sqrt(self.channels), EPS, 1 / SILU_GAIN)
        self.options = {
            "normalised": normalised,
            "mixes": second > 0,
            "height": height,
            "width": width,
            "num_warps": 2 * WARPS,
        }


class _Modulation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: Tensor) -> Tensor:
        h, factor = h.contiguous(memory_format=torch.channels_last), factor.contiguous()
        out = torch.empty_like(h)
        grid, sizes, options = _modulation_shape(h)
        _modulation_kernel[grid](h, factor, out, *sizes, **options)
        ctx.save_for_backward(h, factor)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        h, factor = ctx.saved_tensors
        dy, dh = dy.contiguous(memory_format=torch.channels_last), torch.empty_like(h)
        grid, sizes, options = _modulation_shape(h)
        partial = h.new_empty(len(h), grid[0], h.shape[1], dtype=torch.float32)
        _modulation_backward_kernel[grid](h, factor, dy, dh, partial, *sizes, **options)
        return dh, sum_rows(partial).to(factor.dtype)


def _modulation_shape(h: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, float], dict[str, int]]:
    """Return the grid of a modulation's kernels (pixels, images, channels), their sizes and their options."""
    images, channels, height, width = h.shape
    pixels, lanes = height * width, min(LANES, triton.next_power_of_2(channels))
    rows_each = min(MODULATION_ROWS, triton.next_power_of_2(pixels))  # a multiple of a tile's, or all in one program
    options = {"height": TILE // LANES, "width": lanes, "rows_each": rows_each, "num_warps": 2 * WARPS}
    grid = (triton.cdiv(pixels, rows_each), images, triton.cdiv(channels, lanes))
    return grid, (pixels, channels, 1 / SILU_GAIN), options


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, a_factor: float, b_factor: float, limit: float) -> Tensor:
        a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
        out = torch.empty_like(a)
        count = out.numel()
        _sum_kernel[(triton.cdiv(count, TILE),)](
            *(a, b, out, count, a_factor, b_factor, limit), tile=TILE, num_warps=2 * WARPS
        )
        ctx.save_for_backward(out if limit < math.inf else None)
        ctx.factors, ctx.limit, ctx.b_dtype = (a_factor, b_factor), limit, b.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        da, db, count = torch.empty_like(dy), torch.empty_like(dy, dtype=ctx.b_dtype), dy.numel()
        _sum_backward_kernel[(triton.cdiv(count, TILE),)](
            *(dy, out, da, db, count, *ctx.factors, ctx.limit),
            clips=out is not None,
            tile=TILE,
            num_warps=2 * WARPS,
        )
        return da, db, None, None, None


@triton.jit
def _fork_kernel(
    x_ptr, beside_ptr, main_ptr, act_ptr,
    rows, channels, first, x_factor, beside_factor, root, eps, gain, x_stride, beside_stride,
    stores_main: tl.constexpr, activates: tl.constexpr, normalised: tl.constexpr, mixes: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    channel = tl.arange(0, width)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    x = load_pixels(x_ptr, x_stride, beside_ptr, beside_stride, row, channel, first, mask, mixes).to(tl.float32)
    if mixes:
        x *= tl.where(channel < first, x_factor, beside_factor)[None, :]
    if normalised:
        x = x / (tl.sqrt(tl.sum(x * x, 1)) / root + eps)[:, None]
    place = row[:, None] * channels + channel[None, :]
    if stores_main:
        tl.store(main_ptr + place, x.to(main_ptr.dtype.element_ty), mask=mask)
    if activates:
        tl.store(act_ptr + place, (x * sigmoid(x) * gain).to(act_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fork_backward_kernel(
    x_ptr, beside_ptr, d_main_ptr, d_act_ptr, dx_ptr, d_beside_ptr,
    rows, channels, first, x_factor, beside_factor, root, eps, gain,
    x_stride, beside_stride, d_main_stride, d_act_stride, dx_stride, d_beside_stride,
    has_main: tl.constexpr, has_act: tl.constexpr, normalised: tl.constexpr, mixes: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    channel = tl.arange(0, width)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    x = load_pixels(x_ptr, x_stride, beside_ptr, beside_stride, row, channel, first, mask, mixes).to(tl.float32)
    factor = tl.where(channel < first, x_factor, beside_factor)[None, :]
    if mixes:
        x *= factor
    if normalised:
        norm = tl.sqrt(tl.sum(x * x, 1))
        scale = 1.0 / (norm / root + eps)
        x *= scale[:, None]
    dx = tl.zeros([height, width], tl.float32)
    if has_main:
        place = d_main_ptr + row[:, None] * d_main_stride + channel[None, :]
        dx += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if has_act:
        place = d_act_ptr + row[:, None] * d_act_stride + channel[None, :]
        dx += tl.load(place, mask=mask, other=0.0).to(tl.float32) * (silu_slope(x) * gain)
    if normalised:
        # PyTorch's norm has the gradient 0 at 0.
        along = tl.where(norm > 0, tl.sum(dx * x, 1) / (norm * root * scale), 0.0)
        dx = (dx - x * along[:, None]) * scale[:, None]
    if mixes:
        dx *= factor
    store_pixels(dx, dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, row, channel, first, mask, mixes)


@triton.jit
def _modulation_kernel(
    h_ptr, factor_ptr, out_ptr, pixels, channels, gain,
    height: tl.constexpr, width: tl.constexpr, rows_each: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * width + tl.arange(0, width)
    factor = tl.load(factor_ptr + image * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
    for start in range(0, rows_each, height):
        pixel = tl.program_id(0) * rows_each + start + tl.arange(0, height)
        mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        place = (image * pixels + pixel)[:, None] * channels + channel[None, :]
        z = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
        tl.store(out_ptr + place, (z * sigmoid(z) * gain).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _modulation_backward_kernel(
    h_ptr, factor_ptr, dy_ptr, dh_ptr, partial_ptr, pixels, channels, gain,
    height: tl.constexpr, width: tl.constexpr, rows_each: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * width + tl.arange(0, width)
    factor = tl.load(factor_ptr + image * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
    total = tl.zeros([width], tl.float32)
    for start in range(0, rows_each, height):
        pixel = tl.program_id(0) * rows_each + start + tl.arange(0, height)
        mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        place = (image * pixels + pixel)[:, None] * channels + channel[None, :]
        h = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32) * (silu_slope(h * factor[None, :]) * gain)
        total += tl.sum(dz * h, 0)
        tl.store(dh_ptr + place, (dz * factor[None, :]).to(dh_ptr.dtype.element_ty), mask=mask)
    place = (image * tl.num_programs(0) + tl.program_id(0)) * channels + channel
    tl.store(partial_ptr + place, total, mask=channel < channels)


@triton.jit
def _sum_kernel(a_ptr, b_ptr, out_ptr, count, a_factor, b_factor, limit, tile: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    mask = index < count
    a = tl.load(a_ptr + index, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + index, mask=mask, other=0.0).to(tl.float32)
    total = a * a_factor + b * b_factor
    total = tl.where(total > limit, limit, tl.where(total < -limit, -limit, total))  # not min, which hides a nan
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_backward_kernel(
    dy_ptr, out_ptr, da_ptr, db_ptr, count, a_factor, b_factor, limit, clips: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    mask = index < count
    dy = tl.load(dy_ptr + index, mask=mask, other=0.0).to(tl.float32)
    if clips:
        out = tl.load(out_ptr + index, mask=mask, other=0.0).to(tl.float32)
        dy = tl.where(tl.abs(out) < limit, dy, 0.0)
    tl.store(da_ptr + index, (dy * a_factor).to(da_ptr.dtype.element_ty), mask=mask)
    tl.store(db_ptr + index, (dy * b_factor).to(db_ptr.dtype.element_ty), mask=mask)
