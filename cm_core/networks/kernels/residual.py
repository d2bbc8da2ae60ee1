"""Residual sums with bias and factor, of a tensor or its projection."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cm_core.networks.kernels.layout import TILE, WARPS, channels_last, pixel_stride, sum_rows

BIAS_GRADIENT_ROWS = 512  # pixels per program that sums bias gradients
# Tile of a projection's product: pixels, channels out and channels in (`least` at least), and its launch settings.
PROJECT = {"pixels": 128, "out": 128, "in": 64, "least": 16, "stages": 3, "warps": 4}


def residual_add(x: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
    """Return (x + h + bias) * factor for x, h [B, C, H, W] and bias [C], channels last."""
    return _ResidualAdd.apply(x, h, bias, factor)


def projects(x: Tensor, beside: Tensor) -> bool:
    """Whether `project_residual_add` supports these: 16-bit tensors with whole tiles of channels."""
    return x.dtype.itemsize == 2 and not (x.shape[1] % PROJECT["least"] or beside.shape[1] % PROJECT["least"])


def project_residual_add(x: Tensor, beside: Tensor, weight: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
    """Return (weight @ [x, beside] + h + bias) * factor, channels last.

    Shapes: x [B, c, H, W], beside [B, C - c, H, W], weight [D, C], h [B, D, H, W], bias [D].
    """
    return _ProjectResidualAdd.apply(x, beside, weight, h, bias, factor)


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
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, d_bias = _residual_add_backward(dy, ctx.factor)
        return dx, dx, d_bias.to(ctx.bias_dtype), None


class _ProjectResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beside: Tensor, weight: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
        x, beside, h = channels_last(x), channels_last(beside), h.contiguous(memory_format=torch.channels_last)
        weight = weight.to(x.dtype).contiguous()
        out, first, second = torch.empty_like(h), x.shape[1], beside.shape[1]
        rows, channels = out.numel() // out.shape[1], out.shape[1]
        grid = (triton.cdiv(rows, PROJECT["pixels"]) * triton.cdiv(channels, PROJECT["out"]),)
        _project_residual_add_kernel[grid](
            *(x, beside, weight, h, bias, out),
            *(rows, channels, first, second, pixel_stride(x), pixel_stride(beside), factor),
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
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
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
    """Return the gradients of a residual summand, and of the bias [C] in float32."""
    dy = channels_last(dy)
    channels, rows = dy.shape[1], dy.numel() // dy.shape[1]
    width = min(128, triton.next_power_of_2(channels))
    grid = (triton.cdiv(rows, BIAS_GRADIENT_ROWS), triton.cdiv(channels, width))
    partial = dy.new_empty(grid[0], channels, dtype=torch.float32)
    dx = dy if factor == 1 else torch.empty_like(dy, memory_format=torch.channels_last)
    _residual_add_backward_kernel[grid](
        *(dy, dx, partial, rows, channels, pixel_stride(dy), factor),
        scaled=factor != 1,
        height=TILE // width,
        width=width,
        rows_each=BIAS_GRADIENT_ROWS,
        num_warps=2 * WARPS,
    )
    return dx, sum_rows(partial[None])[0]


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
    tiles = tl.cdiv(channels, width)  # programs of the same pixels are adjacent and share the L2 cache
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
