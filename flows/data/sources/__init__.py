"""Sources of images: recipe sections that read themselves.

Each implements `Source` and `read(scratch, monitor) -> Contents`; `scratch` is a folder for unpacked files that exists
while the images are read.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from cm_core.params import Params
from flows.monitor import Monitor
from flows.storage.fetch import download_dir, fetch
from flows.storage.s3 import public_uri

MAX_CLASSES = 100_000  # a larger label is an identifier or an error, not a class


@dataclass(frozen=True, slots=True)
class Item:
    """One image, opened lazily."""

    name: str  # machine-independent: splits and draws depend on it
    where: str  # its name in errors
    label: int  # -1: none
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class Contents:
    """All contents of a source."""

    train: list[Item]
    heldout: list[Item] | None  # None: the source has no split of its own
    class_names: tuple[str, ...]  # empty: no labels
    ignored: tuple[str, ...] = ()  # files that are not images
    unused: Mapping[str, int] = field(default_factory=dict)  # images by further held-out folders that nobody reads
    label_gaps: tuple[int, ...] = ()  # numbers below the highest label that no training image has; not kept as classes


class Source(Params):
    """A source of images with a fixed name and shape."""

    native_shape: ClassVar[tuple[int, int, int] | None] = None
    """[C, H, W] of the images if known before reading them."""

    kind: str

    def dataset_name(self) -> str:
        """Return the name for reports."""
        return self.kind

    def bring(self, monitor: Monitor) -> None:
        """Download what is kept between runs, and read what has a checksum, whose hash is then on record."""


class FileSource(Source):
    """The fields of sources that read the user's files."""

    path: str = Field(min_length=1)
    heldout_path: str | None = None
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")
    """SHA-256 of the file at `path`; a download is kept and reused only with it."""
    name: str | None = None
    """Name of the data set in reports; null takes the name of the file or folder."""
    version: str = ""
    """Any word; stages are cached by the recipe, so change it when the contents of `path` changed."""
    licence: str = "not stated; set data.source.licence"
    """One line on the terms of use, repeated in dataset.json."""

    def dataset_name(self) -> str:
        """Return the name for reports."""
        return self.name or PurePosixPath(public_uri(self.path)).name.partition(".")[0]

    def bring(self, monitor: Monitor) -> None:
        """As of every source: the file at `path`, if its checksum is given."""
        if self.sha256:
            fetch(self.path, download_dir(self.sha256), sha256=self.sha256, monitor=monitor)

    def origin(self) -> str:
        """Return the source's entry for dataset.json."""
        return public_uri(self.path)


def array_items(images: np.ndarray, labels: np.ndarray | None, where: str) -> list[Item]:
    """Make items of pixels uint8 [N, H, W, C], C being 1 or 3."""
    flat = images[..., 0] if images.shape[-1] == 1 else images
    labels = np.full(len(images), -1) if labels is None else labels
    return [
        Item(str(index), f"{where}[{index}]", int(label), partial(Image.fromarray, flat[index]))
        for index, label in enumerate(labels)
    ]


def label_gaps(used: Collection[int]) -> tuple[int, ...]:
    """Return the whole numbers below the highest label that are no label."""
    return tuple(sorted(set(range(max(used, default=0))) - set(used)))
