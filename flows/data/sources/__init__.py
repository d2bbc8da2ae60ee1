"""Where images come from. A source is a section of the recipe that can read itself.

Each offers `native_shape()` ([C, H, W] of its images where that is known beforehand), `origin()` (what
dataset.json names as the source), `dataset_name()` and `read(scratch, monitor) -> Contents`; `scratch` is a
folder for unpacked files that lives as long as the images are read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

MAX_CLASSES = 100_000  # a label beyond is an identifier or an error, not a class


@dataclass(frozen=True, slots=True)
class Item:
    """One image, opened when it is needed."""

    name: str  # the same on every machine: splits and draws depend on it
    where: str  # how an error names it
    label: int  # -1: none
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class Contents:
    """Everything that a source offers."""

    train: list[Item]
    heldout: list[Item] | None  # None: the source has no split of its own
    class_names: tuple[str, ...]  # empty: no labels
    ignored: int = 0  # files that are no images


def array_items(images: np.ndarray, labels: np.ndarray | None, where: str) -> list[Item]:
    """Make items of pixels uint8 [N, H, W, C], C being 1 or 3."""
    flat = images[..., 0] if images.shape[-1] == 1 else images
    labels = np.full(len(images), -1) if labels is None else labels
    return [
        Item(str(index), f"{where}[{index}]", int(label), partial(Image.fromarray, flat[index]))
        for index, label in enumerate(labels)
    ]
