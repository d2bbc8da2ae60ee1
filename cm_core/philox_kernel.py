"""The Gaussian numbers of `philox.normals` in one kernel, where PyTorch passes over memory for every operation."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cm_core.philox import MULTIPLIERS, ROUNDS, WEYL, WORD

TILE, WARPS = 256, 4  # counters per program, four numbers each, and its warps
MULTIPLIER0, MULTIPLIER1 = (tl.constexpr(factor) for factor in MULTIPLIERS)
WEYL0, WEYL1 = (tl.constexpr(step) for step in WEYL)
TWO_PI, WORDS = tl.constexpr(2 * math.pi), tl.constexpr(2.0**32)


def normals(indices: Tensor, draw: int, count: int, seed: int) -> Tensor:
    """Return `count` unit Gaussian numbers for each index, float32 [N, count], as `philox.normals` does."""
    blocks = triton.cdiv(count, 4)
    out = torch.empty(len(indices), 4 * blocks, device=indices.device)
    grid = (len(indices), triton.cdiv(blocks, TILE))
    keys = seed & WORD, seed >> 32 & WORD
    _normals[grid](indices, out, blocks, draw, *keys, rounds=ROUNDS, tile=TILE, num_warps=WARPS)
    return out[:, :count]


@triton.jit(do_not_specialize=["draw", "key0", "key1"])  # one kernel for all seeds
def _normals(index_ptr, out_ptr, blocks, draw, key0, key1, rounds: tl.constexpr, tile: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * tile + tl.arange(0, tile)
    index = tl.load(index_ptr + row)
    zero = tl.zeros([tile], tl.uint32)
    c0, c1 = block.to(tl.uint32), zero + draw.to(tl.uint32)
    c2, c3 = zero + index.to(tl.uint32), zero + (index >> 32).to(tl.uint32)
    key0, key1 = key0.to(tl.uint32), key1.to(tl.uint32)
    c0, c1, c2, c3 = philox(c0, c1, c2, c3, key0, key1, rounds)
    place = out_ptr + row * 4 * blocks + 4 * block
    mask = block < blocks
    first, second = _box_muller(c0, c1)
    tl.store(place, first, mask=mask)
    tl.store(place + 1, second, mask=mask)
    first, second = _box_muller(c2, c3)
    tl.store(place + 2, first, mask=mask)
    tl.store(place + 3, second, mask=mask)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1, rounds: tl.constexpr):
    zero = tl.zeros_like(c0)
    for _ in tl.static_range(rounds):
        high0, low0 = tl.umulhi(c0, zero + MULTIPLIER0), c0 * MULTIPLIER0
        high1, low1 = tl.umulhi(c2, zero + MULTIPLIER1), c2 * MULTIPLIER1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + WEYL0, key1 + WEYL1
    return c0, c1, c2, c3


@triton.jit
def _box_muller(u, v):
    u, v = (u.to(tl.float64) + 0.5) / WORDS, (v.to(tl.float64) + 0.5) / WORDS
    radius, angle = tl.sqrt(-2 * tl.log(u)), TWO_PI * v
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)
