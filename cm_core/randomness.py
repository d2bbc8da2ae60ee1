"""Randomness from (seed, purpose, position): a resumed run draws what the uninterrupted run drew."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """Mix integers and words into one 63-bit seed; the same parts give the same seed on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Return a generator on `device`, seeded by `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let the global generator of the CPU, which initialises weights, begin at `seed`; restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
