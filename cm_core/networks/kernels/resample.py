"""Downsampling and upsampling by 2 x 2 pixels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cm_core.networks.kernels.layout import TILE, WARPS, channels_last, empty_channels_last, pixel_stride


def downsample(x: Tensor, factor: float) -> Tensor:
    """Return the sum of each 2 x 2 pixels times `factor`, channels last."""
    return _Resample.apply(x, factor, True)


def upsample(x: Tensor, factor: float) -> Tensor:
    """Return each pixel four times, times `factor`, channels last."""
    return _Resample.apply(x, factor, False)


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, halves: bool) -> Tensor:
        ctx.factor, ctx.halves = factor, halves
        return _resample(x, factor, halves)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _resample(dy, ctx.factor, not ctx.halves), None, None  # each is the other's adjoint


def _resample(x: Tensor, factor: float, halves: bool) -> Tensor:
    x = channels_last(x)
    images, channels, height, width = x.shape
    height, width = (height // 2, width // 2) if halves else (2 * height, 2 * width)
    out = empty_channels_last(x, channels, height, width)
    tile = min(TILE, triton.next_power_of_2(channels))
    rows = images * height * width
    grid = (triton.cdiv(rows, TILE // tile), triton.cdiv(channels, tile))  # CUDA limits the second to 65,535
    sizes = (rows, channels, height, width, pixel_stride(x))
    (_downsample_kernel if halves else _upsample_kernel)[grid](
        x, out, *sizes, factor, rows_each=TILE // tile, tile=tile, num_warps=WARPS
    )
    return out


@triton.jit
def _downsample_kernel(
    x_ptr, out_ptr, rows, channels, height, width, x_stride, factor, rows_each: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows_each + tl.arange(0, rows_each)  # pixels of the downsampled images
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
    row = tl.program_id(0).to(tl.int64) * rows_each + tl.arange(0, rows_each)  # pixels of the upsampled images
    channel = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    line, column = row // width, row % width  # lines of all images
    source = (line // height) * (height // 2) + (line % height) // 2
    pixel = source * (width // 2) + column // 2
    x = tl.load(x_ptr + pixel[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + row[:, None] * channels + channel[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)
