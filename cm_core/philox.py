"""Random numbers from a counter: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Every number is a function of its position alone: any part of a stream can be computed directly, on any device.
"""

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of Philox-4x32
WEYL = (0x9E3779B9, 0xBB67AE85)  # increments of the two key words per round
ROUNDS = 10
WORD = 0xFFFFFFFF  # the lower 32 bits; words are held in int64, which knows no unsigned overflow


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four words in 0..2^32-1, int64, for each counter of four such words; they broadcast. Seed: 64 bits."""
    c0, c1, c2, c3 = counter
    keys = seed & WORD, seed >> 32 & WORD
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0
        keys = (keys[0] + WEYL[0]) & WORD, (keys[1] + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower word of a product; int64 wraps around, and the bits are those of uint64."""
    product = word * factor
    return product >> 32 & WORD, product & WORD


def normals(indices: Tensor, draw: int, count: int, seed: int) -> Tensor:
    """Return `count` unit Gaussian numbers for each index, float32 [N, count]: draw number `draw` of (seed, index).

    Box-Muller in float64: its last digits differ between devices, but hardly survive rounding to float32.
    """
    block = torch.arange((count + 3) // 4, device=indices.device)
    zero = torch.zeros_like(block)
    index = indices[:, None]
    words = philox((block + 0 * index, zero + draw, index & WORD, index >> 32 & WORD), seed)
    u0, u1, u2, u3 = ((word.double() + 0.5) / 2**32 for word in words)  # in 0..1, both excluded
    pairs = (*_box_muller(u0, u1), *_box_muller(u2, u3))
    return torch.stack(pairs, dim=-1).flatten(1)[:, :count].float()


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return radius * angle.cos(), radius * angle.sin()
