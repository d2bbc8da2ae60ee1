"""Stage `prepare`: decode real images from any source into one memory-mapped uint8 array per split."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from cm_core.params import Params
from flows.data.images import TRAITS, convert, is_grey, preview_grid, upright_size
from flows.data.sources import Contents, Item
from flows.data.sources.array import ArrayFile
from flows.data.sources.cifar10 import Cifar10
from flows.data.sources.digits import Digits
from flows.data.sources.image_files import Images
from flows.errors import UserError
from flows.monitor import Monitor

CHUNK = 64  # images per worker task
T = TypeVar("T")


class Data(Params):
    """The images, and how they are brought to one shape."""

    model_config = ConfigDict(title="Data")

    source: Digits | Cifar10 | Images | ArrayFile = Digits()
    """The source of the images."""
    resolution: int | None = Field(None, ge=4, le=4096)
    """Side of the square images in pixels; null keeps their own size, which must then be the same for all."""
    resize: Literal["none", "center-crop", "center-crop-dhariwal", "pad", "stretch"] = "none"
    """How other sizes get there: `center-crop` as EDM, `center-crop-dhariwal` as ADM and OpenAI; none refuses them."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """One or three; auto: one if no image has colour, else three."""
    background: Literal["white", "black"] = "white"
    """The colour behind transparent pixels."""
    heldout_fraction: float = Field(0.25, ge=0, le=0.9)
    """Part of each class held out from training, chosen by a hash of the names, where the source has no such split."""
    max_images: int | None = Field(None, ge=1)
    """At most this many images of each split, chosen by a hash of the names; null takes all."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.resize != "none" and self.resolution is None:
            raise ValueError(f"data.resize={self.resize} needs data.resolution, the side in pixels")
        native = self.source.native_shape()
        if native and self.resize == "none" and self.resolution not in (None, native[1]):
            raise ValueError(
                f"data.resolution={self.resolution}: {self.source.kind} has {native[2]}x{native[1]} pixels;"
                " give data.resize a policy other than none"
            )
        return self

    def image_shape(self) -> tuple[int, int, int] | None:
        """Return [C, H, W] if this section alone decides it, else None."""
        native = self.source.native_shape() or (None, None, None)
        channels = {"auto": native[0], "grey": 1, "rgb": 3}[self.channels]
        height, width = (self.resolution, self.resolution) if self.resolution else native[1:]
        return (channels, height, width) if channels and height and width else None


def prepare(data: Data, out_dir: Path, monitor: Monitor) -> None:
    """Write both splits, preview.png and, last, dataset.json, which marks the data set complete.
    Raises UserError, naming the file, if images are unavailable, unreadable or cannot be brought to one shape.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "dataset.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="cm-prepare-") as scratch:
        contents = data.source.read(Path(scratch), monitor)
        splits = _choose_splits(contents, data)
        shape = _common_shape(splits["train"] + splits["heldout"], data, monitor)
        _refuse_full_disk(out_dir, sum(map(len, splits.values())) * math.prod(shape))
        traits = {split: _write_split(split, splits[split], shape, data, out_dir, monitor) for split in splits}
    _write_preview(out_dir, contents.class_names)
    counts = {split: len(items) for split, items in splits.items()}
    counts |= {trait: sum(found[trait] for found in traits.values()) for trait in TRAITS}
    facts = _facts(data, contents, shape, counts | {"ignored_files": contents.ignored})
    facts["sha256"] = {split: _sha256(out_dir, split) for split in splits}
    (out_dir / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n")


def _facts(data: Data, contents: Contents, shape: tuple[int, int, int], counts: dict[str, int]) -> dict[str, Any]:
    return {
        "name": data.source.dataset_name(),
        "image_shape": [shape[2], *shape[:2]],
        "num_classes": len(contents.class_names),
        "class_names": contents.class_names,
        "counts": counts,
        "heldout": "part of each class, by a hash of the names" if contents.heldout is None else "as in the source",
        "resize": data.resize,
        "source": data.source.origin(),
        "licence": data.source.licence,
    }


def _choose_splits(contents: Contents, data: Data) -> dict[str, list[Item]]:
    train, heldout = contents.train, contents.heldout
    if heldout is None:
        train, heldout = _hold_out(train, data.heldout_fraction)
    splits = {"train": _draw(train, data.max_images), "heldout": _draw(heldout, data.max_images)}
    if not splits["train"]:
        raise UserError(f"{data.source.origin()}: no images to train on ({len(heldout)} are held out)")
    return splits


def _hold_out(items: Sequence[Item], fraction: float) -> tuple[list[Item], list[Item]]:
    """Split class by class; images added later leave most others in their split."""
    by_class: dict[int, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    heldout = {item.name for members in by_class.values() for item in _first(members, round(fraction * len(members)))}
    return [i for i in items if i.name not in heldout], [i for i in items if i.name in heldout]


def _draw(items: list[Item], limit: int | None) -> list[Item]:
    if limit is None or len(items) <= limit:
        return items
    chosen = {item.name for item in _first(items, limit)}
    return [item for item in items if item.name in chosen]


def _first(items: Sequence[Item], count: int) -> list[Item]:
    """Return the first `count` in a pseudo-random order that is the same on every machine."""
    return sorted(items, key=lambda i: hashlib.sha256(i.name.encode(errors="surrogateescape")).digest())[:count]


def _common_shape(items: list[Item], data: Data, monitor: Monitor) -> tuple[int, int, int]:
    """Return [H, W, C] of the prepared images; read every header if the recipe leaves a size open."""
    if (shape := data.image_shape()) and (data.resize != "none" or data.source.native_shape()):
        return *shape[1:], shape[0]
    headers = list(_map(lambda index: _read_header(items[index]), len(items), monitor, "headers"))
    grey = data.channels == "grey" or (data.channels == "auto" and all(colourless for _, colourless in headers))
    side = data.resolution
    width, height = (side, side) if side else headers[0][0]
    for item, (size, _) in zip(items, headers, strict=True):
        if data.resize == "none" and size != (width, height):
            raise UserError(
                f"{item.where}: is {size[0]}x{size[1]} pixels, where {width}x{height} are expected;"
                " set data.resolution and data.resize to bring all to one size"
            )
    return height, width, 1 if grey else 3


def _read_header(item: Item) -> tuple[tuple[int, int], bool]:
    with item.open() as image:
        return upright_size(image), is_grey(image)


def _write_split(
    split: str, items: list[Item], shape: tuple[int, int, int], data: Data, out_dir: Path, monitor: Monitor
) -> Counter[str]:
    """Decode into {split}_images.npy, write {split}_labels.npy, and count the images' traits."""
    np.save(out_dir / f"{split}_labels.npy", np.array([item.label for item in items], dtype=np.int64))
    path = out_dir / f"{split}_images.npy"
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(items), *shape))

    how = {"channels": shape[2], **data.model_dump(include={"resize", "resolution", "background"})}

    def decode(index: int) -> set[str]:
        where = items[index].where
        with items[index].open() as image:
            pixels, traits = convert(image, where, **how)
        if pixels.shape != shape:  # the header promised another size
            raise UserError(f"{where}: decodes to {list(pixels.shape)}, where {list(shape)} is expected")
        images[index] = pixels
        return traits

    counts = Counter(trait for traits in _map(decode, len(items), monitor, f"{split} images") for trait in traits)
    images.flush()
    return counts


def _map(work: Callable[[int], T], count: int, monitor: Monitor, unit: str) -> Iterator[T]:
    """Yield work(0), ..., work(count - 1), computed by threads: the decoders release the GIL."""
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for results in pool.map(lambda chunk: [work(index) for index in chunk], chunks):
            done += len(results)
            monitor.progress(done, count, unit)
            yield from results


def _refuse_full_disk(out_dir: Path, needed: int) -> None:
    # Check first: writing to a memory-mapped file on a full disk kills the process without a message.
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise UserError(f"{out_dir}: the prepared images need {needed >> 20} MiB, {free >> 20} MiB are free")


def _write_preview(out_dir: Path, class_names: tuple[str, ...]) -> None:
    images, labels = (np.load(out_dir / f"train_{part}.npy", mmap_mode="r") for part in ("images", "labels"))
    preview_grid(images, labels, class_names).save(out_dir / "preview.png")


def _sha256(out_dir: Path, split: str) -> str:
    return hashlib.sha256(np.load(out_dir / f"{split}_images.npy", mmap_mode="r")).hexdigest()
