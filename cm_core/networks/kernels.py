"""Triton kernels for what is bound by memory in a U-Net, channels last: norm with SiLU, residual sum, resampling.

A decoder's input, what came from below and what the encoder left beside it, is read where its two parts lie.

PyTorch's group norm wants channels first and copies in and out; here a program holds all pixels of some whole groups of
one image in registers, or reads larger ones twice. Arithmetic is float32 whatever the tensors hold, and gradients are
those of the formulas, so only rounding differs from the plain layers.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

TILE, WARPS = 4096, 4  # elements a program holds at a time where an image is passed over in steps, and its warps
CHANNELS = 32  # a program of the norm takes whole groups, of about so many channels: 64 bytes of bf16
HELD = {1: 32_768, 2: 16_384}  # pixels times channels that a program holds at most, with one array and with two
EACH = {1: 64, 2: 32}  # of them in a thread
BIAS_GRADIENT_ROWS = 512  # pixels whose bias gradients one program sums
# The product of a projection: pixels, channels out and channels in of a tile (`least` at least), and how it is run.
PROJECT = {"pixels": 128, "out": 128, "in": 64, "least": 16, "stages": 3, "warps": 4}


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
    beside: Tensor | None = None,  # [B, C - c, H, W] where x has but the first c channels
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return act(group_norm(x + bias + before) * scale + shift) in x's dtype, channels last; and x and beside again.

    Whoever needs these two after the norm takes them from here: gradients that meet are then added by its own kernel.
    """
    return _NormAct.apply(x, beside, bias, before, scale, shift, groups, eps, silu)


def downsample(x: Tensor, factor: float) -> Tensor:
    """Return the sum of each 2 x 2 pixels times `factor`, channels last."""
    return _Resample.apply(x, factor, True)


def upsample(x: Tensor, factor: float) -> Tensor:
    """Return each pixel four times, times `factor`, channels last."""
    return _Resample.apply(x, factor, False)


def residual_add(x: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
    """Return (x + h + bias) * factor for x, h [B, C, H, W] and bias [C], channels last."""
    return _ResidualAdd.apply(x, h, bias, factor)


def projects(x: Tensor, beside: Tensor) -> bool:
    """Whether `project_residual_add` takes these: 16-bit tensors whose channels come in whole tiles."""
    return x.dtype.itemsize == 2 and not (x.shape[1] % PROJECT["least"] or beside.shape[1] % PROJECT["least"])


def project_residual_add(x: Tensor, beside: Tensor, weight: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
    """Return (weight @ [x, beside] + h + bias) * factor, channels last.

    Of x [B, c, H, W], beside [B, C - c, H, W], weight [D, C], h [B, D, H, W] and bias [D].
    """
    return _ProjectResidualAdd.apply(x, beside, weight, h, bias, factor)


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
        x, beside = _channels_last(x), None if beside is None else _channels_last(beside)
        before = None if before is None else before.contiguous()
        scale, shift = scale.contiguous(), shift.contiguous()
        shape = _NormShape(x, beside, groups, arrays=1)
        y = _empty(x, shape.channels, *x.shape[2:])
        mean, rstd = x.new_empty(2, len(x), groups, dtype=torch.float32)
        _norm_forward[shape.grid](
            *(x, beside, bias, before, scale, shift, y, mean, rstd),
            *(*shape.sizes, _pixel_stride(x), _pixel_stride(beside), _row_stride(scale), eps),
            has_bias=bias is not None,
            has_before=before is not None,
            silu=silu,
            **shape.tiles,
        )
        ctx.save_for_backward(x, beside, bias, before, scale, shift, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        ctx.set_materialize_grads(False)
        return y, *passed

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *d_passed: Tensor | None) -> tuple:
        x, beside, bias, before, scale, shift, mean, rstd = ctx.saved_tensors
        passes = any(d is not None for d in d_passed)
        if passes:
            d_passed = [_passed(d, t) for d, t in zip(d_passed, (x, beside), strict=True)]
        dy, shape = _channels_last(dy), _NormShape(x, beside, ctx.groups, arrays=2)
        dx, d_beside = (None if t is None else _empty(t, *t.shape[1:]) for t in (x, beside))
        added = bias is not None or before is not None
        of_images = x.new_empty(2 + added, len(x), shape.channels, dtype=torch.float32)
        d_scale, d_shift, d_before = of_images[0], of_images[1], of_images[-1]  # this one is written if `added`
        _norm_backward[shape.grid](
            *(x, beside, bias, before, scale, shift, mean, rstd, dy, *d_passed),
            *(dx, d_beside, d_before, d_scale, d_shift, *shape.sizes),
            *(_pixel_stride(t) for t in (x, beside, dy, *d_passed)),
            _row_stride(scale),
            has_bias=bias is not None,
            has_before=before is not None,
            passes=passes,
            silu=ctx.silu,
            **shape.tiles,
        )
        sums = _sum_rows(of_images if scale.ndim == 1 else of_images[2:])
        if scale.ndim == 1:
            d_scale, d_shift = sums[0], sums[1]
        d_bias = None if bias is None else sums[-1].to(bias.dtype)
        d_before = None if before is None else d_before.to(before.dtype)
        return dx, d_beside, d_bias, d_before, d_scale.to(scale.dtype), d_shift.to(shift.dtype), None, None, None


def _passed(d: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Return the gradient of what passed a norm by, zeros where nobody used that, None where there was nothing."""
    if like is None:
        return None
    return torch.zeros_like(like) if d is None else _channels_last(d)


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
        x, h = (t.contiguous(memory_format=torch.channels_last) for t in (x, h))
        out = torch.empty_like(h)
        count = out.numel()
        _residual_add_forward_kernel[(triton.cdiv(count, TILE),)](
            *(x, h, bias, out, count, out.shape[1], factor), tile=TILE, num_warps=2 * WARPS
        )
        ctx.factor, ctx.bias_dtype = factor, bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        dx, d_bias = _residual_add_backward(dy, ctx.factor)
        return dx, dx, d_bias.to(ctx.bias_dtype), None


class _ProjectResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beside: Tensor, weight: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
        x, beside, h = _channels_last(x), _channels_last(beside), h.contiguous(memory_format=torch.channels_last)
        weight = weight.to(x.dtype).contiguous()
        out, first, second = torch.empty_like(h), x.shape[1], beside.shape[1]
        rows, channels = out.numel() // out.shape[1], out.shape[1]
        grid = (triton.cdiv(rows, PROJECT["pixels"]) * triton.cdiv(channels, PROJECT["out"]),)
        _project_residual_add_kernel[grid](
            *(x, beside, weight, h, bias, out),
            *(rows, channels, first, second, _pixel_stride(x), _pixel_stride(beside), factor),
            height=PROJECT["pixels"],
            width=PROJECT["out"],
            depth=math.gcd(PROJECT["in"], first, second),
            num_stages=PROJECT["stages"],
            num_warps=PROJECT["warps"],
        )
        ctx.save_for_backward(x, beside, weight)
        ctx.factor, ctx.bias_dtype = factor, bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, beside, weight = ctx.saved_tensors
        dh, d_bias = _residual_add_backward(dy, ctx.factor)
        rows = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, beside, dh)]  # [B H W, channels], views
        d_parts = [rows[2] @ part for part in weight.split([x.shape[1], beside.shape[1]], dim=1)]
        d_x, d_beside = (
            d_part.view(len(t), *t.shape[2:], t.shape[1]).permute(0, 3, 1, 2)
            for d_part, t in zip(d_parts, (x, beside), strict=True)
        )
        d_weight = torch.cat([rows[2].mT @ rows[0], rows[2].mT @ rows[1]], dim=1)
        return d_x, d_beside, d_weight, dh, d_bias.to(ctx.bias_dtype), None


def _residual_add_backward(dy: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of a joined tensor, and of the bias [C] in float32."""
    dy = _channels_last(dy)
    channels, rows = dy.shape[1], dy.numel() // dy.shape[1]
    width = min(128, triton.next_power_of_2(channels))
    grid = (triton.cdiv(rows, BIAS_GRADIENT_ROWS), triton.cdiv(channels, width))
    partial = dy.new_empty(grid[0], channels, dtype=torch.float32)
    dx = dy if factor == 1 else torch.empty_like(dy, memory_format=torch.channels_last)
    _residual_add_backward_kernel[grid](
        *(dy, dx, partial, rows, channels, _pixel_stride(dy), factor),
        scaled=factor != 1,
        height=TILE // width,
        width=width,
        rows_each=BIAS_GRADIENT_ROWS,
        num_warps=2 * WARPS,
    )
    return dx, _sum_rows(partial[None])[0]


def _sum_rows(x: Tensor) -> Tensor:
    """Return the sums [N, columns] of float32 [N, rows, columns]; PyTorch's own is slow for so few columns."""
    arrays, rows, columns = x.shape
    out = x.new_empty(arrays, columns)
    width = min(16, triton.next_power_of_2(columns))
    _sum_columns[(triton.cdiv(columns, width), arrays)](
        *(x, out, rows, columns), height=TILE // width, width=width, num_warps=WARPS
    )
    return out


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
    out = _empty(x, channels, height, width)
    tile = min(TILE, triton.next_power_of_2(channels))
    rows = images * height * width
    grid = (triton.cdiv(rows, TILE // tile), triton.cdiv(channels, tile))  # the second may be 65,535 at most
    sizes = (rows, channels, height, width, _pixel_stride(x))
    (_downsample_kernel if halves else _upsample_kernel)[grid](
        x, out, *sizes, factor, rows_each=TILE // tile, tile=tile, num_warps=WARPS
    )
    return out


class _NormShape:
    """How a norm's programs share the images: the grid, the kernel's sizes and its tiles.

    `arrays` is how many values a program needs of each pixel and channel: x, or x and a gradient.
    """

    def __init__(self, x: Tensor, beside: Tensor | None, groups: int, *, arrays: int) -> None:
        images, first, height, width = x.shape
        self.channels = first + (0 if beside is None else beside.shape[1])
        pixels, group_size = triton.next_power_of_2(height * width), self.channels // groups
        wanted = min(CHANNELS, max(CHANNELS // 2, HELD[arrays] // pixels))
        if arrays == 1 and (CHANNELS // 2) % group_size == 0:
            wanted = CHANNELS // 2  # as fast as it gets, where so few are whole groups
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


def _channels_last(x: Tensor) -> Tensor:
    """Return `x` with its channels side by side and its pixels evenly spaced; a slice of channels is so already."""
    _, _, height, width = x.shape
    even = height == 1 or width == 1 or x.stride(2) == width * x.stride(3)
    whole = x.stride(0) == height * width * _pixel_stride(x)
    return x if x.stride(1) == 1 and even and whole else x.contiguous(memory_format=torch.channels_last)


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return a tensor for as many images, channels last."""
    kind = {"dtype": like.dtype, "device": like.device, "memory_format": torch.channels_last}
    return torch.empty(len(like), channels, height, width, **kind)


def _pixel_stride(x: Tensor | None) -> int:
    if x is None:
        return 0
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def _row_stride(v: Tensor) -> int:
    return 0 if v.ndim == 1 else v.shape[1]


@triton.jit
def _norm_forward(
    x_ptr, beside_ptr, bias_ptr, before_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr,
    pixels, channels, first_channels, groups, x_stride, beside_stride, affine_stride, eps,
    has_bias: tl.constexpr, has_before: tl.constexpr, silu: tl.constexpr, picks: tl.constexpr, mixes: tl.constexpr,
    whole: tl.constexpr, full: tl.constexpr, group_size: tl.constexpr, groups_each: tl.constexpr, width: tl.constexpr,
    height: tl.constexpr, group_width: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, width)
    start = tl.program_id(0) * groups_each * group_size
    channel = start + local
    valid = (local < groups_each * group_size) & (channel < channels)
    local_group = tl.arange(0, group_width)
    member = (local // group_size)[:, None] == local_group[None, :]  # [width, group_width]
    if picks:
        x_ptr, x_stride = _pick(x_ptr, x_stride, beside_ptr, beside_stride, start, first_channels)
    x_ptr += image * pixels * x_stride
    if mixes:
        beside_ptr += image * pixels * beside_stride
    y_ptr += image * pixels * channels

    held, first, total, squares = _channel_sums(
        x_ptr, x_stride, beside_ptr, beside_stride, pixels, channel, first_channels, valid, mixes, whole, full, height
    )
    added = _added(bias_ptr, before_ptr, image, channel, channels, valid, has_bias, has_before)
    channel_mean = first + total / pixels + added
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
    offset = shift - (mean - added) * factor
    pixel = tl.arange(0, height)
    if whole:
        mask = _mask(pixel, pixels, valid, full)
        _store_act(held, factor, offset, y_ptr, pixel, channel, channels, mask, silu)
    else:
        for past in range(0, pixels, height):
            mask = _mask(past + pixel, pixels, valid, full)
            x = _load_pixels(
                x_ptr, x_stride, beside_ptr, beside_stride, past + pixel, channel, first_channels, mask, mixes
            )
            _store_act(x, factor, offset, y_ptr, past + pixel, channel, channels, mask, silu)


@triton.jit
def _channel_sums(
    x_ptr, x_stride, beside_ptr, beside_stride, pixels, channel, first_channels, valid,
    mixes: tl.constexpr, whole: tl.constexpr, full: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    """Return the first tile of an image, its first pixel, and the sums of all differences to that and their squares.

    A mean far from zero then costs no digits of the variance.
    """
    one = tl.arange(0, 1)
    first = _load_pixels(
        x_ptr, x_stride, beside_ptr, beside_stride, one, channel, first_channels, valid[None, :], mixes
    )
    first = tl.sum(first.to(tl.float32), 0)
    pixel = tl.arange(0, height)
    mask = _mask(pixel, pixels, valid, full)
    held = _load_pixels(x_ptr, x_stride, beside_ptr, beside_stride, pixel, channel, first_channels, mask, mixes)
    x = tl.where(mask, held.to(tl.float32) - first[None, :], 0.0)
    total = tl.sum(x, 0)
    squares = tl.sum(x * x, 0)
    if not whole:
        for past in range(height, pixels, height):
            mask = _mask(past + pixel, pixels, valid, full)
            x = _load_pixels(
                x_ptr, x_stride, beside_ptr, beside_stride, past + pixel, channel, first_channels, mask, mixes
            )
            x = tl.where(mask, x.to(tl.float32) - first[None, :], 0.0)
            total += tl.sum(x, 0)
            squares += tl.sum(x * x, 0)
    return held, first, total, squares


@triton.jit
def _mask(pixel, pixels, valid, full: tl.constexpr):
    """Return which [pixels, channels] of a tile there are; all of a full one, and nothing is compared then."""
    mask = (pixel < pixels)[:, None] & valid[None, :]
    if full:
        mask = tl.full(mask.shape, True, tl.int1)
    return mask


@triton.jit
def _sigmoid(z):
    return libdevice.fast_dividef(1.0, 1.0 + tl.exp(-z))  # within 2 ulp; the exact division is a tenth of a norm's time


@triton.jit
def _added(bias_ptr, before_ptr, image, channel, channels, valid, has_bias: tl.constexpr, has_before: tl.constexpr):
    """Return what is added to every pixel of an image before its norm, by channel."""
    added = tl.where(valid, 0.0, 0.0)
    if has_bias:
        added += tl.load(bias_ptr + channel, mask=valid, other=0.0).to(tl.float32)
    if has_before:
        added += tl.load(before_ptr + image * channels + channel, mask=valid, other=0.0).to(tl.float32)
    return added


@triton.jit
def _pick(x_ptr, x_stride, beside_ptr, beside_stride, start, first_channels):
    """Return where a program reads its channels, which lie all in x or all beside it."""
    is_beside = start >= first_channels
    return tl.where(is_beside, beside_ptr - first_channels, x_ptr), tl.where(is_beside, beside_stride, x_stride)


@triton.jit
def _load_pixels(
    x_ptr, x_stride, beside_ptr, beside_stride, pixel, channel, first_channels, mask, mixes: tl.constexpr
):  # fmt: skip
    """Load [pixels, channels] of one image; those from `first_channels` on lie beside where a program `mixes`."""
    own = mask
    if mixes:
        own = mask & (channel < first_channels)[None, :]
    x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=own, other=0.0)
    if mixes:
        place = beside_ptr + pixel[:, None] * beside_stride + (channel - first_channels)[None, :]
        x = tl.where(own, x, tl.load(place, mask=mask & (channel >= first_channels)[None, :], other=0.0))
    return x


@triton.jit
def _store_act(x, factor, offset, y_ptr, pixel, channel, channels, mask, silu: tl.constexpr):
    y = x.to(tl.float32) * factor[None, :] + offset[None, :]
    if silu:
        y = y * _sigmoid(y)
    tl.store(y_ptr + pixel[:, None] * channels + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(
    x_ptr, beside_ptr, bias_ptr, before_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, dy_ptr, passed_ptr,
    passed_beside_ptr, dx_ptr, d_beside_ptr, d_before_ptr, d_scale_ptr, d_shift_ptr,
    pixels, channels, first_channels, groups, x_stride, beside_stride, dy_stride, passed_stride, passed_beside_stride,
    affine_stride,
    has_bias: tl.constexpr, has_before: tl.constexpr, passes: tl.constexpr, silu: tl.constexpr, picks: tl.constexpr,
    mixes: tl.constexpr, whole: tl.constexpr, full: tl.constexpr, group_size: tl.constexpr, groups_each: tl.constexpr,
    width: tl.constexpr, height: tl.constexpr, group_width: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    local = tl.arange(0, width)
    start = tl.program_id(0) * groups_each * group_size
    channel = start + local
    valid = (local < groups_each * group_size) & (channel < channels)
    member = (local // group_size)[:, None] == tl.arange(0, group_width)[None, :]  # [width, group_width]
    dx_stride, d_beside_stride = first_channels, channels - first_channels
    if picks:
        x_ptr, x_stride = _pick(x_ptr, x_stride, beside_ptr, beside_stride, start, first_channels)
        dx_ptr, dx_stride = _pick(dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, start, first_channels)
        if passes:
            passed_ptr, passed_stride = _pick(
                passed_ptr, passed_stride, passed_beside_ptr, passed_beside_stride, start, first_channels
            )
    if passes:
        passed_ptr += image * pixels * passed_stride
        if mixes:
            passed_beside_ptr += image * pixels * passed_beside_stride
    x_ptr += image * pixels * x_stride
    dy_ptr += image * pixels * dy_stride
    dx_ptr += image * pixels * dx_stride
    if mixes:
        beside_ptr += image * pixels * beside_stride
        d_beside_ptr += image * pixels * d_beside_stride
    mean = tl.load(mean_ptr + image * groups + channel // group_size, mask=valid, other=0.0)
    rstd = tl.load(rstd_ptr + image * groups + channel // group_size, mask=valid, other=0.0)
    scale = tl.load(scale_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + image * affine_stride + channel, mask=valid, other=0.0).to(tl.float32)
    mean -= _added(bias_ptr, before_ptr, image, channel, channels, valid, has_bias, has_before)

    x, dy, sum_dz, sum_dz_normed, sum_normed = _gradient_sums(
        x_ptr, x_stride, beside_ptr, beside_stride, dy_ptr, dy_stride, pixels, channel, first_channels, valid, mean,
        rstd, scale, shift, mixes, silu, whole, full, height,
    )  # fmt: skip
    tl.store(d_shift_ptr + image * channels + channel, sum_dz, mask=valid)
    tl.store(d_scale_ptr + image * channels + channel, sum_dz_normed, mask=valid)

    count = pixels * group_size
    group_dz = tl.sum(tl.where(member, (scale * sum_dz)[:, None], 0.0), 0) / count
    group_dz_normed = tl.sum(tl.where(member, (scale * sum_dz_normed)[:, None], 0.0), 0) / count
    mean_dz = tl.sum(tl.where(member, group_dz[None, :], 0.0), 1)
    mean_dz_normed = tl.sum(tl.where(member, group_dz_normed[None, :], 0.0), 1)
    if has_bias or has_before:
        d_before = rstd * (scale * sum_dz - pixels * mean_dz - sum_normed * mean_dz_normed)
        tl.store(d_before_ptr + image * channels + channel, d_before, mask=valid)
    pixel = tl.arange(0, height)
    for past in range(0, height if whole else pixels, height):
        mask = _mask(past + pixel, pixels, valid, full)
        if not whole:
            x = _load_pixels(
                x_ptr, x_stride, beside_ptr, beside_stride, past + pixel, channel, first_channels, mask, mixes
            )
            dy = tl.load(dy_ptr + (past + pixel)[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
        # Of a whole image computed again: holding them costs more.
        normed, dz = _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu)
        dx = rstd[None, :] * (scale[None, :] * dz - mean_dz[None, :] - normed * mean_dz_normed[None, :])
        if passes:
            dx += _load_pixels(
                passed_ptr, passed_stride, passed_beside_ptr, passed_beside_stride, past + pixel, channel,
                first_channels, mask, mixes,
            ).to(tl.float32)  # fmt: skip
        _store_pixels(
            dx, dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, past + pixel, channel, first_channels, mask, mixes
        )


@triton.jit
def _gradient_sums(
    x_ptr, x_stride, beside_ptr, beside_stride, dy_ptr, dy_stride, pixels, channel, first_channels, valid, mean, rstd,
    scale, shift,
    mixes: tl.constexpr, silu: tl.constexpr, whole: tl.constexpr, full: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    """Return the first tiles of x and dy, and the sums over an image's pixels of dz, of dz normed and of normed.

    Where z = normed * scale + shift and y = act(z).
    """
    pixel = tl.arange(0, height)
    mask = _mask(pixel, pixels, valid, full)
    held_x = _load_pixels(x_ptr, x_stride, beside_ptr, beside_stride, pixel, channel, first_channels, mask, mixes)
    held_dy = tl.load(dy_ptr + pixel[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
    normed, dz = _normed_and_dz(held_x, held_dy, mask, mean, rstd, scale, shift, silu)
    sum_dz, sum_dz_normed, sum_normed = tl.sum(dz, 0), tl.sum(dz * normed, 0), tl.sum(normed, 0)
    if not whole:
        for past in range(height, pixels, height):
            mask = _mask(past + pixel, pixels, valid, full)
            x = _load_pixels(
                x_ptr, x_stride, beside_ptr, beside_stride, past + pixel, channel, first_channels, mask, mixes
            )
            dy = tl.load(dy_ptr + (past + pixel)[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0)
            normed, dz = _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu)
            sum_dz += tl.sum(dz, 0)
            sum_dz_normed += tl.sum(dz * normed, 0)
            sum_normed += tl.sum(normed, 0)
    return held_x, held_dy, sum_dz, sum_dz_normed, sum_normed


@triton.jit
def _normed_and_dz(x, dy, mask, mean, rstd, scale, shift, silu: tl.constexpr):
    dz = dy.to(tl.float32)
    normed = tl.where(mask, (x.to(tl.float32) - mean[None, :]) * rstd[None, :], 0.0)
    if silu:
        z = normed * scale[None, :] + shift[None, :]
        gate = _sigmoid(z)
        dz *= gate * (1 + z * (1 - gate))
    return normed, dz


@triton.jit
def _store_pixels(
    dx, dx_ptr, dx_stride, d_beside_ptr, d_beside_stride, pixel, channel, first_channels, mask, mixes: tl.constexpr
):  # fmt: skip
    """Store [pixels, channels] of one image where `_load_pixels` would load them."""
    dx = dx.to(dx_ptr.dtype.element_ty)
    own = mask
    if mixes:
        own = mask & (channel < first_channels)[None, :]
    tl.store(dx_ptr + pixel[:, None] * dx_stride + channel[None, :], dx, mask=own)
    if mixes:
        place = d_beside_ptr + pixel[:, None] * d_beside_stride + (channel - first_channels)[None, :]
        tl.store(place, dx, mask=mask & (channel >= first_channels)[None, :])


@triton.jit
def _downsample_kernel(
    x_ptr, out_ptr, rows, channels, height, width, x_stride, factor, rows_each: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows_each + tl.arange(0, rows_each)  # pixels of the halved images
    channel = tl.program_id(1) * tile + tl.arange(0, tile)
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
def _upsample_kernel(
    x_ptr, out_ptr, rows, channels, height, width, x_stride, factor, rows_each: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows_each + tl.arange(0, rows_each)  # pixels of the doubled images
    channel = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    line, column = row // width, row % width  # lines of all images
    source = (line // height) * (height // 2) + (line % height) // 2
    pixel = source * (width // 2) + column // 2
    x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + row[:, None] * channels + channel[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residual_add_forward_kernel(x_ptr, h_ptr, bias_ptr, out_ptr, count, channels, factor, tile: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    mask = index < count
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + index, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + index % channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, ((x + h + bias) * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _project_residual_add_kernel(
    x_ptr, beside_ptr, weight_ptr, h_ptr, bias_ptr, out_ptr,
    rows, channels, first, second, x_stride, beside_stride, factor,
    height: tl.constexpr, width: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(channels, width)  # programs of the same pixels are neighbours, and find them in the L2 cache
    row = (tl.program_id(0) // tiles).to(tl.int64) * height + tl.arange(0, height)
    out = (tl.program_id(0) % tiles) * width + tl.arange(0, width)
    inner = tl.arange(0, depth)
    total = tl.zeros([height, width], tl.float32)
    for start in range(0, first + second, depth):
        is_beside = start >= first
        source, stride = tl.where(is_beside, beside_ptr, x_ptr), tl.where(is_beside, beside_stride, x_stride)
        column = start - tl.where(is_beside, first, 0) + inner
        x = tl.load(source + row[:, None] * stride + column[None, :], mask=(row < rows)[:, None], other=0.0)
        place = weight_ptr + out[None, :] * (first + second) + (start + inner)[:, None]
        total = tl.dot(x, tl.load(place, mask=(out < channels)[None, :], other=0.0), total)
    mask = (row < rows)[:, None] & (out < channels)[None, :]
    place = row[:, None] * channels + out[None, :]
    total += tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias_ptr + out, mask=out < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + place, (total * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _residual_add_backward_kernel(
    dy_ptr, dx_ptr, partial_ptr, rows, channels, dy_stride, factor,
    scaled: tl.constexpr, height: tl.constexpr, width: tl.constexpr, rows_each: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(1) * width + tl.arange(0, width)
    valid = channel < channels
    first = tl.program_id(0).to(tl.int64) * rows_each
    total = tl.zeros([width], tl.float32)
    for start in range(0, rows_each, height):
        row = first + start + tl.arange(0, height)
        mask = (row < rows)[:, None] & valid[None, :]
        dx = tl.load(dy_ptr + row[:, None] * dy_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32) * factor
        total += tl.sum(dx, 0)
        if scaled:
            tl.store(dx_ptr + row[:, None] * channels + channel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * channels + channel, total, mask=valid)


@triton.jit
def _sum_columns(x_ptr, out_ptr, rows, columns, height: tl.constexpr, width: tl.constexpr):
    column = tl.program_id(0) * width + tl.arange(0, width)
    x_ptr += tl.program_id(1).to(tl.int64) * rows * columns
    total = tl.zeros([height, width], tl.float32)
    for start in range(0, rows, height):
        row = start + tl.arange(0, height)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(x_ptr + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + tl.program_id(1) * columns + column, tl.sum(total, 0), mask=column < columns)
