"""Dropout in one kernel, which generates the mask of `dropout.keep_mask` in place and never stores it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cm_core.networks.dropout import LEVELS, PER_COUNTER
from cm_core.philox import ROUNDS
from cm_core.philox_kernel import philox

TILE, WARPS = 256, 4  # counters per program, eight activations each, and its warps
LEVEL_MASK, HALVES = tl.constexpr(LEVELS - 1), tl.constexpr(PER_COUNTER // 2)


def masked(h: Tensor, seed: Tensor, kept: int, layer: int, first: int) -> Tensor:
    """Return h [B, C, H, W], channels last, scaled where it is kept; 0 elsewhere."""
    h = h.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(h)
    size = h[0].numel()
    blocks = triton.cdiv(size, PER_COUNTER)
    grid = (len(h), triton.cdiv(blocks, TILE))
    _masked[grid](
        h, out, seed, size, blocks, kept, layer, first, LEVELS / kept, rounds=ROUNDS, tile=TILE, num_warps=WARPS
    )
    return out


@triton.jit(do_not_specialize=["layer", "first"])
def _masked(
    h_ptr, out_ptr, seed_ptr, size, blocks, kept, layer, first, scale, rounds: tl.constexpr, tile: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * tile + tl.arange(0, tile)
    seed, row = tl.load(seed_ptr), first + program
    zero = tl.zeros([tile], tl.uint32)
    c1, c2, c3 = zero + layer.to(tl.uint32), zero + row.to(tl.uint32), zero + (row >> 32).to(tl.uint32)
    words = philox(block.to(tl.uint32), c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), rounds)
    for i in tl.static_range(HALVES):
        for half in tl.static_range(2):
            draw = (words[i] >> (16 * half)) & LEVEL_MASK
            element = (2 * i + half) * blocks + block
            inside = (block < blocks) & (element < size)
            h = tl.load(h_ptr + program * size + element, mask=inside)
            out = tl.where(draw < kept, h.to(tl.float32) * scale, 0.0)
            tl.store(out_ptr + program * size + element, out.to(h.dtype), mask=inside)
