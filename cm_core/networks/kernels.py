"""Triton kernels for what is bound by memory in a U-Net, channels last: norm with SiLU, residual sum, resampling.

PyTorch's group norm wants channels first and copies in and out; here a program holds all pixels of some whole groups of
one image in registers, or reads larger ones twice. Arithmetic is float32 whatever the tensors hold, and gradients are
those of the formulas, so only rounding differs from the plain layers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, WARPS = 4096, 4  # elements a program holds at a time where an image is passed over in steps, and its warps
CHANNELS = 32  # a program of the norm takes whole groups, of about so many channels: 64 bytes of bf16
HELD = {1: 32_768, 2: 16_384}  # pixels times channels that a program holds at most, with one array and with two
EACH = {1: 64, 2: 32}  # of them in a thread
JOIN_ROWS = 512  # pixels whose bias gradients one program sums


def norm_act(
    x: Tensor,  # [B, C, H, W]
    *,
    groups: int,
    eps: float,
    scale: Tensor,  # [C] or [B, C]
    shift: Tensor,  # [C] or [B, C]
    silu: bool,
    before: Tensor | None = None,  # [B, C], added to every pixel first
) -> Tensor:
    """Return act(group_norm(x + before) * scale + shift) in x's dtype, channels last."""
    return _NormAct.apply(x, before, scale, shift, groups, eps, silu)


def halve(x: Tensor, factor: float) -> Tensor:
    """Return the sum of each 2 x 2 pixels times `factor`, channels last."""
    return _Resample.apply(x, factor, True)


def double(x: Tensor, factor: float) -> Tensor:
    """Return each pixel four times, times `factor`, channels last."""
    return _Resample.apply(x, factor, False)


def join(x: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
    """Return (x + h + bias) * factor for x, h [B, C, H, W] and bias [C], channels last."""
    return _Join.apply(x, h, bias, factor)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, before: Tensor | None, scale: Tensor, shift: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        x = _channels_last(x)
        before = None if before is None else before.contiguous()
        scale, shift = scale.contiguous(), shift.contiguous()
        y = torch.empty_like(x)
        mean, rstd = x.new_empty(2, len(x), groups, dtype=torch.float32)
        shape = _NormShape(x, groups, arrays=1)
        _norm_forward[shape.grid](
            *(x, before, scale, shift, y, mean, rstd),
            *(*shape.sizes, _pixel_stride(x), _row_stride(scale), eps),
            has_before=before is not None,
            silu=silu,
            **shape.tiles,
        )
        ctx.save_for_backward(x, before, scale, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, before, scale, shift, mean, rstd = ctx.saved_tensors
        dy, dx = _channels_last(dy), torch.empty_like(x, memory_format=torch.channels_last)
        d_before, d_scale, d_shift = x.new_empty(3, *x.shape[:2], dtype=torch.float32)
        shape = _NormShape(x, ctx.groups, arrays=2)
        _norm_backward[shape.grid](
            *(x, before, scale, shift, mean, rstd, dy, dx, d_before, d_scale, d_shift),
            *(*shape.sizes, _pixel_stride(x), _pixel_stride(dy), _row_stride(scale)),
            has_before=before is not None,
            silu=ctx.silu,
            **shape.tiles,
        )
        if scale.ndim == 1:
            d_scale, d_shift = d_scale.sum(0), d_shift.sum(0)
        d_before = None if before is None else d_before.to(before.dtype)
        return dx, d_before, d_scale.to(scale.dtype), d_shift.to(shift.dtype), None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
        x, h = (t.contiguous(memory_format=torch.channels_last) for t in (x, h))
        out = torch.empty_like(h)
        count = out.numel()
        _join_forward[(triton.cdiv(count, TILE),)](
            *(x, h, bias, out, count, out.shape[1], factor), tile=TILE, num_warps=2 * WARPS
        )
        ctx.factor, ctx.bias_dtype = factor, bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        dy = _channels_last(dy)
        channels, rows = dy.shape[1], dy.numel() // dy.shape[1]
        width = min(128, triton.next_power_of_2(channels))
        grid = (triton.cdiv(channels, width), triton.cdiv(rows, JOIN_ROWS))
        partial = dy.new_empty(grid[1], channels, dtype=torch.float32)
        dx = dy if ctx.factor == 1 else torch.empty_like(dy, memory_format=torch.channels_last)
        _join_backward[grid](
            *(dy, dx, partial, rows, channels, _pixel_stride(dy), ctx.factor),
            scaled=ctx.factor != 1,
            height=TILE // width,
            width=width,
            rows_each=JOIN_ROWS,
            num_warps=2 * WARPS,
        )
        return dx, dx, partial.sum(0).to(ctx.bias_dtype), None


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, halves: bool) -> Tensor:
        ctx.factor, ctx.halves = factor, halves
        return _resample(x, factor, halves)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        return _resample(dy, ctx.factor, not ctx.halves), None, None  # each is the other's adjoint


def _resample(x: Tensor, factor: float, halves: bool) -> Tensor:
    x = _channels_last(x)
    images, channels, height, width = x.shape
    height, width = (height // 2, width // 2) if halves else (2 * height, 2 * width)
    like = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
    out = torch.empty(images, channels, height, width, **like)
    tile = min(TILE, triton.next_power_of_2(channels))
    rows = images * height * width
    grid = (triton.cdiv(channels, tile), triton.cdiv(rows, TILE // tile))
    sizes = (rows, channels, height, width, _pixel_stride(x))
    (_halve if halves else _double)[grid](x, out, *sizes, factor, rows_each=TILE // tile, tile=tile, num_warps=WARPS)
    return out


class _NormShape:
    """How a norm's programs share the images: the grid, the kernel's sizes and its tiles.

    `arrays` is how many values a program needs of each pixel and channel: x, or x and a gradient.
    """

    def __init__(self, x: Tensor, groups: int, *, arrays: int) -> None:
        images, channels, height, width = x.shape
        pixels, group_size = triton.next_power_of_2(height * width), channels // groups
        wanted = min(CHANNELS, max(CHANNELS // 2, HELD[arrays] // pixels))
        groups_each = max(1, min(groups, wanted // group_size))
        tile_width = triton.next_power_of_2(groups_each * group_size)
        whole = pixels * tile_width <= HELD[arrays]
        tile_height = pixels if whole else max(1, TILE // tile_width)
        self.grid = (triton.cdiv(groups, groups_each), images)
        self.sizes = (height * width, channels, groups)
        self.tiles = {
            "whole": whole,
            "group_size": group_size,
            "groups_each": groups_each,
            "width": tile_width,
            "height": tile_height,
            "group_width": triton.next_power_of_2(groups_each),
            "num_warps": max(1, tile_height * tile_width // (32 * EACH[arrays])) if whole else WARPS,
        }


def _channels_last(x: Tensor) -> Tensor:
    """Return `x` with its channels side by side and its pixels evenly spaced; a slice of channels is so already."""
    _, _, height, width = x.shape
    even = height == 1 or width == 1 or x.stride(2) == width * x.stride(3)
    whole = x.stride(0) == height * width * _pixel_stride(x)
    return x if x.stride(1) == 1 and even and whole else x.contiguous(memory_format=torch.channels_last)


def _pixel_stride(x: Tensor) -> int:
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def _row_stride(v: Tensor) -> int:
    return 0 if v.ndim == 1 else v.shape[1]


@triton.jit
def _norm_forward(
    x_ptr, before_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    pixels, channels, groups, x_stride, affine_stride, eps,
    has_before: tl.constexpr, silu: tl.constexpr, whole: tl.constexpr,
    group_size: tl.constexpr, groups_each: tl.constexpr, width: tl.constexpr, height: tl.constexpr,
    group_width: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, width)
    channel = tl.program_id(0) * groups_each * group_size + local
    valid = (local < groups_each * group_size) & (channel < channels)
    local_group = tl.arange(0, group_width)
    member = (local // group_size)[:, None] == local_group[None, :]  # [width, group_width]
    x_ptr += image * pixels * x_stride
    y_ptr += image * pixels * channels

    # Sums are of differences to the first pixel: a mean far from zero then costs no digits of the variance.
    first = tl.load(x_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    pixel = tl.arange(0, height)
    mask = (pixel < pixels)[:, None] & valid[None, :]
    held = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0)
    x = tl.where(mask, held.to(tl.float32) - first[None, :], 0.0)
    total = tl.sum(x, 0)
    squares = tl.sum(x * x, 0)
    if not whole:
        for start in range(height, pixels, height):
            pixel = start + tl.arange(0, height)
            mask = (pixel < pixels)[:, None] & valid[None, :]
            x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - first[None, :], 0.0)
            total += tl.sum(x, 0)
            squares += tl.sum(x * x, 0)
    channel_mean = first + total / pixels
    if has_before:
        before = tl.load(before_ptr + image * channels + channel, mask=valid, other=0.0).to(tl.float32)
        channel_mean += before
    spread = squares - total * total / pixels
    group_mean = tl.sum(tl.where(member & valid[:, None], channel_mean[:, None], 0.0), 0) / group_size
    mean = tl.sum(tl.where(member, group_mean[None, :], 0.0), 1)
    spread += pixels * (channel_mean - mean) * (channel_mean - mean)
    group_var = tl.sum(tl.where(member & valid[:, None], spread[:, None], 0.0), 0) / (pixels * group_size)
    group_rstd = 1.0 / tl.sqrt(group_var + eps)
    rstd = tl.sum(tl.where(member, group_rstd[None, :], 0.0), 1)
    group = tl.program_id(0) * groups_each + local_group
    kept = (local_group < groups_each) & (group < groups)
    tl.store(mean_ptr + image * groups + group, group_mean, mask=kept)
    tl.store(rstd_ptr + image * groups + group, group_rstd, mask=kept)

    scale = tl.load(scale_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    factor = rstd * scale
    if has_before:
        mean -= before
    offset = shift - mean * factor
    if whole:
        _store_act(held.to(tl.float32), factor, offset, y_ptr, pixel, channel, channels, mask, silu)
    else:
        for start in range(0, pixels, height):
            pixel = start + tl.arange(0, height)
            mask = (pixel < pixels)[:, None] & valid[None, :]
            x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            _store_act(x, factor, offset, y_ptr, pixel, channel, channels, mask, silu)


@triton.jit
def _store_act(x, factor, offset, y_ptr, pixel, channel, channels, mask, silu: tl.constexpr):
    y = x * factor[None, :] + offset[None, :]
    if silu:
        y = y * tl.sigmoid(y)
    tl.store(y_ptr + pixel[:, None] * channels + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(
    x_ptr, before_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, dy_ptr, dx_ptr,
    d_before_ptr, d_scale_ptr, d_shift_ptr,
    pixels, channels, groups, x_stride, dy_stride, affine_stride,
    has_before: tl.constexpr, silu: tl.constexpr, whole: tl.constexpr,
    group_size: tl.constexpr, groups_each: tl.constexpr, width: tl.constexpr, height: tl.constexpr,
    group_width: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, width)
    channel = tl.program_id(0) * groups_each * group_size + local
    valid = (local < groups_each * group_size) & (channel < channels)
    member = (local // group_size)[:, None] == tl.arange(0, group_width)[None, :]  # [width, group_width]
    x_ptr += image * pixels * x_stride
    dy_ptr += image * pixels * dy_stride
    dx_ptr += image * pixels * channels
    mean = tl.load(mean_ptr + image * groups + channel // group_size, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + image * groups + channel // group_size, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    if has_before:
        mean -= tl.load(before_ptr + image * channels + channel, mask=valid, other=0.0).to(tl.float32)

    # z = normed * scale + shift, y = act(z)
    pixel = tl.arange(0, height)
    mask = (pixel < pixels)[:, None] & valid[None, :]
    x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0)
    dy = tl.load(dy_ptr + pixel[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
    normed, dz = _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu)
    sum_dz, sum_dz_normed, sum_normed = tl.sum(dz, 0), tl.sum(dz * normed, 0), tl.sum(normed, 0)
    if not whole:
        for start in range(height, pixels, height):
            pixel = start + tl.arange(0, height)
            mask = (pixel < pixels)[:, None] & valid[None, :]
            x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0)
            dy = tl.load(dy_ptr + pixel[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
            normed, dz = _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu)
            sum_dz += tl.sum(dz, 0)
            sum_dz_normed += tl.sum(dz * normed, 0)
            sum_normed += tl.sum(normed, 0)
    tl.store(d_shift_ptr + image * channels + channel, sum_dz, mask=valid)
    tl.store(d_scale_ptr + image * channels + channel, sum_dz_normed, mask=valid)

    count = pixels * group_size
    group_dz = tl.sum(tl.where(member, (scale * sum_dz)[:, None], 0.0), 0) / count
    group_dz_normed = tl.sum(tl.where(member, (scale * sum_dz_normed)[:, None], 0.0), 0) / count
    mean_dz = tl.sum(tl.where(member, group_dz[None, :], 0.0), 1)
    mean_dz_normed = tl.sum(tl.where(member, group_dz_normed[None, :], 0.0), 1)
    if has_before:
        d_before = rstd * (scale * sum_dz - pixels * mean_dz - sum_normed * mean_dz_normed)
        tl.store(d_before_ptr + image * channels + channel, d_before, mask=valid)
    if whole:
        normed, dz = _normed_and_dz(
            x, dy, mask, mean, rstd, scale, shift, silu
        )  # computed again: holding them costs more
        _store_dx(dx_ptr, normed, dz, mean_dz, mean_dz_normed, rstd, scale, pixel, channel, channels, mask)
    else:
        for start in range(0, pixels, height):
            pixel = start + tl.arange(0, height)
            mask = (pixel < pixels)[:, None] & valid[None, :]
            x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0)
            dy = tl.load(dy_ptr + pixel[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
            normed, dz = _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu)
            _store_dx(dx_ptr, normed, dz, mean_dz, mean_dz_normed, rstd, scale, pixel, channel, channels, mask)


@triton.jit
def _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu: tl.constexpr):
    dz = dy.to(tl.float32)
    normed = tl.where(mask, (x.to(tl.float32) - mean[None, :]) * rstd[None, :], 0.0)
    if silu:
        z = normed * scale[None, :] + shift[None, :]
        gate = tl.sigmoid(z)
        dz *= gate * (1 + z * (1 - gate))
    return normed, dz


@triton.jit
def _store_dx(dx_ptr, normed, dz, mean_dz, mean_dz_normed, rstd, scale, pixel, channel, channels, mask):
    dx = rstd[None, :] * (scale[None, :] * dz - mean_dz[None, :] - normed * mean_dz_normed[None, :])
    tl.store(dx_ptr + pixel[:, None] * channels + channel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _halve(
    x_ptr, out_ptr, rows, channels, height, width, x_stride, factor, rows_each: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * rows_each + tl.arange(0, rows_each)  # pixels of the halved images
    channel = tl.program_id(0) * tile + tl.arange(0, tile)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    top = (row // width) * (4 * width) + 2 * (row % width)  # images follow each other, all of 2 height rows
    place = x_ptr + top[:, None] * x_stride + channel[None, :]
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(place + x_stride, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(place + 2 * width * x_stride, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(place + (2 * width + 1) * x_stride, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * channels + channel[None, :], (total * factor).to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def _double(
    x_ptr, out_ptr, rows, channels, height, width, x_stride, factor, rows_each: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * rows_each + tl.arange(0, rows_each)  # pixels of the doubled images
    channel = tl.program_id(0) * tile + tl.arange(0, tile)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    line, column = row // width, row % width  # lines of all images
    source = (line // height) * (height // 2) + (line % height) // 2
    pixel = source * (width // 2) + column // 2
    x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + row[:, None] * channels + channel[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _join_forward(x_ptr, h_ptr, bias_ptr, out_ptr, count, channels, factor, tile: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    mask = index < count
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + index, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + index % channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, ((x + h + bias) * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _join_backward(
    dy_ptr, dx_ptr, partial_ptr, rows, channels, dy_stride, factor,
    scaled: tl.constexpr, height: tl.constexpr, width: tl.constexpr, rows_each: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * width + tl.arange(0, width)
    valid = channel < channels
    first = tl.program_id(1).to(tl.int64) * rows_each
    total = tl.zeros([width], tl.float32)
    for start in range(0, rows_each, height):
        row = first + start + tl.arange(0, height)
        mask = (row < rows)[:, None] & valid[None, :]
        dx = tl.load(dy_ptr + row[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32) * factor
        total += tl.sum(dx, 0)
        if scaled:
            tl.store(dx_ptr + row[:, None] * channels + channel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(1) * channels + channel, total, mask=valid)
