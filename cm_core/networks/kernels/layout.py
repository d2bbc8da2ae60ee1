"""Shared code of the kernels: channels-last memory layout, and sums over rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, WARPS = 4096, 4  # elements per step of a program that loops over an image, and its warps


def sum_rows(x: Tensor) -> Tensor:
    """Return the sums [N, columns] of float32 [N, rows, columns]; PyTorch's own is slow for so few columns."""
    arrays, rows, columns = x.shape
    out = x.new_empty(arrays, columns)
    width = min(16, triton.next_power_of_2(columns))
    _sum_columns[(triton.cdiv(columns, width), arrays)](
        *(x, out, rows, columns), height=TILE // width, width=width, num_warps=WARPS
    )
    return out


def channels_last(x: Tensor) -> Tensor:
    """Return `x` with unit channel stride and evenly spaced pixels; a slice of channels already has both."""
    _, _, height, width = x.shape
    even = height == 1 or width == 1 or x.stride(2) == width * x.stride(3)
    whole = x.stride(0) == height * width * pixel_stride(x)
    return x if x.stride(1) == 1 and even and whole else x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Return a tensor for as many images, channels last."""
    size = (len(like), channels, height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def pixel_stride(x: Tensor | None) -> int:
    if x is None:
        return 0
    return x.stride(3) if x.shape[3] > 1 else x.stride(2) if x.shape[2] > 1 else x.stride(0)


def row_stride(v: Tensor) -> int:
    return 0 if v.ndim == 1 else v.shape[1]


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
