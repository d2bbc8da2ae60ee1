"""Dropout whose mask is a function of (seed, layer, row, element) alone.

The mask does not depend on how a batch passes through a network: whole or split, on one device or several, captured in
a CUDA graph, recomputed or in forward mode, in any memory layout and precision.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from cm_core.philox import WORD, philox

LEVELS = 2**16  # resolution of the keep probability: 16 random bits per activation
PER_COUNTER = 8  # 16-bit numbers that Philox makes of one counter

_first_row: ContextVar[int] = ContextVar("first_row", default=0)


@functools.cache
def seed_on(device: torch.device) -> Tensor:
    """Return the seed of all masks on a device, in device memory, where CUDA graphs read it."""
    return torch.zeros((), dtype=torch.int64, device=device)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Set the seed of all masks on `device`, for forward and backward passes, until the next call."""
    # A tensor's device has an index, "cuda" has none: they would get separate seeds.
    seed_on(torch.empty((), device=device).device).fill_(seed)


@contextmanager
def rows_from(first: int) -> Iterator[None]:
    """Number the rows of a pass within this context from `first` on, among those of the caller's pass."""
    token = _first_row.set(_first_row.get() + first)
    try:
        yield
    finally:
        _first_row.reset(token)


def of_these_rows(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function` bound to this pass's rows, also when it is recomputed in the backward pass."""
    first = _first_row.get()

    def of_rows(*args: Any) -> Tensor:
        with rows_from(first - _first_row.get()):
            return function(*args)

    return of_rows


def dropout(h: Tensor, p: float, *, layer: int) -> Tensor:
    """Zero activations with probability `p` (in steps of 1/65536) and scale the others, h [B, C, H, W].

    Layers of one network have different numbers `layer`, and so different masks.
    """
    return _Dropout.apply(h, round((1 - p) * LEVELS), layer, _first_row.get())


class _Dropout(torch.autograd.Function):
    """A product with a mask that is regenerated where needed."""

    @staticmethod
    def forward(h: Tensor, kept: int, layer: int, first: int) -> Tensor:
        return _masked(h, kept, layer, first)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int, int], output: Tensor) -> None:
        ctx.mask = inputs[1:]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        return _Dropout.apply(d_out, *ctx.mask), None, None, None

    @staticmethod
    def jvp(ctx: Any, d_h: Tensor, *_: None) -> Tensor:
        return _Dropout.apply(d_h, *ctx.mask)  # it has a gradient, and unwraps torch.func's tensors


def _masked(h: Tensor, kept: int, layer: int, first: int) -> Tensor:
    seed = seed_on(h.device)
    if h.is_cuda and not torch.compiler.is_compiling():
        from cm_core.networks.kernels.dropout import masked

        return masked(h, seed, kept, layer, first)
    return torch.where(keep_mask(h, seed, kept, layer, first), h * (LEVELS / kept), 0.0)


def keep_mask(like: Tensor, seed: Tensor, kept: int, layer: int, first: int) -> Tensor:
    """Return the mask of kept activations, bool in the shape of `like` [B, C, H, W]; `kept` of LEVELS on average.

    A row's activations, channels last, are cut into PER_COUNTER runs; counter i draws the i-th of each run.
    """
    batch, channels, height, width = like.shape
    size = channels * height * width
    block = torch.arange(-(-size // PER_COUNTER), device=like.device)
    row = torch.arange(first, first + batch, device=like.device)[:, None]
    zero = torch.zeros_like(block)
    words = philox((block + 0 * row, zero + layer, row & WORD, row >> 32 & WORD), seed)
    draws = torch.stack([half for word in words for half in (word & (LEVELS - 1), word >> 16)], dim=1)
    keep = draws.flatten(1)[:, :size] < kept
    return keep.view(batch, height, width, channels).permute(0, 3, 1, 2)
