"""A prepared data set measured: brightness, contrast and duplicates of every image, in bounded memory.

Near duplicates are found without comparing all pairs. Each image has a perceptual hash: the signs of its
32 lowest cosine frequencies, the lowest first. Sorted by it, from each of ORDERS of its bits on, images alike stand
close together; each is compared with its next NEIGHBOURS, first by hash and frequencies, then by pixels. In a crowd of
like images, or where the signs of several strong frequencies differ, one may be missed.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BATCH_BYTES = 32 << 20  # pixels measured at a time
BITS = 32
FREQUENCIES = sorted(((i, j) for i in range(8) for j in range(8) if i + j), key=lambda at: (sum(at), at))[:BITS]
ORDERS, NEIGHBOURS = (0, 8, 16, 24), 16
MAX_BITS, MAX_DISTANCE = 6, 4.0  # by which near duplicates differ: bits of the hash, grey levels of low frequencies
MAX_RMS = 10.0  # grey levels by which their pixels differ, less the difference of their means ...
MAX_SHIFT = 24.0  # ... which may be this large


class Pixels:
    """The images of both splits under one index, training images first."""

    def __init__(self, train: np.ndarray, heldout: np.ndarray) -> None:
        self.parts, self.num_train = (train, heldout), len(train)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return images by their indices, uint8 [N, H, W, C]."""
        images = np.empty((len(indices), *self.parts[0].shape[1:]), np.uint8)
        train = indices < self.num_train
        images[train], images[~train] = self.parts[0][indices[train]], self.parts[1][indices[~train] - self.num_train]
        return images

    def batches(self) -> Iterator[np.ndarray]:
        """Yield all images in order, BATCH_BYTES at a time."""
        size = self.batch_size()
        for part in self.parts:
            for start in range(0, len(part), size):
                yield np.asarray(part[start : start + size])

    def batch_size(self) -> int:
        """Return how many images take BATCH_BYTES."""
        return max(1, BATCH_BYTES // max(1, int(np.prod(self.parts[0].shape[1:]))))


class Pairs(NamedTuple):
    """Duplicates as pairs (earlier, later), each later image once."""

    exact: np.ndarray  # int64 [P, 2]
    near: np.ndarray


@dataclass(frozen=True)
class Measured:
    """Grey levels 0..255, a hash and the lowest frequencies of every image."""

    mean: np.ndarray  # float32 [N]
    deviation: np.ndarray  # float32 [N]
    digest: np.ndarray  # uint64 [N], of the pixels
    frequencies: np.ndarray  # float32 [N, FREQUENCIES], in grey levels


def measure(pixels: Pixels, progress: Callable[[int], None] = lambda done: None) -> Measured:
    """Read every image once."""
    parts: list[tuple[np.ndarray, ...]] = []
    done = 0
    for batch in pixels.batches():
        grey = batch.mean(axis=3, dtype=np.float32)
        digest = [int.from_bytes(hashlib.blake2b(one.tobytes(), digest_size=8).digest()) for one in batch]
        parts.append((grey.mean((1, 2)), grey.std((1, 2)), np.array(digest, np.uint64), low_frequencies(grey)))
        done += len(batch)
        progress(done)
    return Measured(*map(np.concatenate, zip(*parts, strict=True)))


def low_frequencies(grey: np.ndarray) -> np.ndarray:
    """Return the lowest frequencies of images [N, H, W], float32 [N, BITS]: their squares add up to a mean square."""
    rows, columns = (_cosines(size) for size in grey.shape[1:])
    found = rows @ grey @ columns.T
    return np.stack([found[:, i, j] for i, j in FREQUENCIES], axis=1).astype(np.float32)


def _cosines(size: int) -> np.ndarray:
    """Return the eight lowest frequencies of the orthonormal cosine transform over the root of `size`, [8, size]."""
    k = np.arange(8)[:, None]
    waves = np.where(k == 0, 1.0, np.sqrt(2)) * np.cos(np.pi * k * (np.arange(size) + 0.5) / size) / size
    return np.where(k < size, waves, 0).astype(np.float32)


def find_duplicates(pixels: Pixels, measured: Measured) -> Pairs:
    """Return exact duplicates, and near ones among the images that are none."""
    exact = _equal_pairs(measured.digest)
    first = np.setdiff1d(np.arange(len(pixels)), exact[:, 1])
    candidates = first[_alike(measured.frequencies[first])]
    shift = np.abs(measured.mean[candidates[:, 0]] - measured.mean[candidates[:, 1]])
    near = _same_pixels(pixels, candidates[shift <= MAX_SHIFT])
    return Pairs(exact, near[np.unique(near[:, 1], return_index=True)[1]])


def _equal_pairs(digest: np.ndarray) -> np.ndarray:
    """Return (first of its kind, later one) for every image whose pixels came before."""
    _, first, kind = np.unique(digest, return_index=True, return_inverse=True)
    pairs = np.stack([first[kind], np.arange(len(digest))], 1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _alike(frequencies: np.ndarray) -> np.ndarray:
    """Return pairs of indices, the lower first, of images whose hashes and low frequencies are close."""
    hashes = np.packbits(frequencies > 0, axis=1).view(">u4")[:, 0].astype(np.uint32)
    found = [np.empty((0, 2), np.int64)]
    for start in ORDERS:
        turned = hashes << np.uint32(start) | (hashes >> np.uint32(BITS - start) if start else np.uint32(0))
        order = np.argsort(turned, kind="stable")
        turned = turned[order]
        for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            at = np.flatnonzero(np.bitwise_count(turned[:-step] ^ turned[step:]) <= MAX_BITS)
            pairs = np.stack([order[at], order[at + step]], 1)
            distance = np.linalg.norm(frequencies[pairs[:, 0]] - frequencies[pairs[:, 1]], axis=1)
            found.append(np.sort(pairs[distance <= MAX_DISTANCE], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _same_pixels(pixels: Pixels, pairs: np.ndarray) -> np.ndarray:
    """Return the pairs whose pixels differ by MAX_RMS at most, less the difference of their means."""
    kept = [np.empty((0, 2), np.int64)]
    size = pixels.batch_size() // 4 or 1
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        first, second = (pixels.take(column).mean(3, dtype=np.float32) for column in some.T)
        kept.append(some[(first - second).std((1, 2)) <= MAX_RMS])
    return np.concatenate(kept)
