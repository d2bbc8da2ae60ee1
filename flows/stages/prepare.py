"""Stage `prepare`: decode real images from any source into one memory-mapped uint8 array per split."""

import hashlib
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from cm_core.params import Params
from flows.data.decoding import list_faults, map_images
from flows.data.images import TRAITS, convert, is_grey, upright_size
from flows.data.latents import Encoding, write_latents
from flows.data.new_array import new_array
from flows.data.sources import Contents, Item
from flows.data.sources.array import ArrayFile
from flows.data.sources.cifar10 import Cifar10
from flows.data.sources.digits import Digits
from flows.data.sources.image_files import Images
from flows.errors import UserError
from flows.monitor import Monitor
from flows.reports.data import write_data_report

COPIED = 1024  # images at a time where skipped ones leave their places


class Data(Params):
    """The images, and how they are brought to one shape."""

    source: Digits | Cifar10 | ArrayFile | Images = Digits()
    """The source of the images."""
    resolution: int | None = Field(None, ge=4, le=4096)
    """Side of the square images in pixels; null keeps their own size, which must then be the same for all."""
    resize: Literal["none", "center-crop", "center-crop-dhariwal", "pad", "stretch"] = "none"
    """How other sizes get there: `center-crop` as EDM, `center-crop-dhariwal` as ADM and OpenAI; none refuses them."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """One or three; auto: one if no image has colour, else three."""
    background: Literal["white", "black"] = "white"
    """The colour behind transparent pixels."""
    colours: Literal["srgb", "ignore"] = "srgb"
    """Embedded colour profiles are converted to sRGB, or ignored, as the tools of ADM and EDM do."""
    damaged: Literal["refuse", "skip"] = "refuse"
    """Images that cannot be used: refuse tells all of them at once; skip leaves them out, listed in dataset.json."""
    heldout_fraction: float = Field(0.25, ge=0, le=0.9)
    """Part of each class held out from training, chosen by a hash of the names, where the source has no such split."""
    max_images: int | None = Field(None, ge=1)
    """At most this many images of each split, chosen by a hash of the names; null takes all."""
    latents: Encoding | None = None
    """An autoencoder whose latents of the images networks learn; null: they learn pixels."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.resize != "none" and self.resolution is None:
            raise ValueError(f"data.resize={self.resize} needs data.resolution, the side in pixels")
        native = self.source.native_shape
        if native and self.resize == "none" and self.resolution not in (None, native[1]):
            raise ValueError(
                f"data.resolution={self.resolution}: {self.source.kind} has {native[2]}x{native[1]} pixels;"
                " give data.resize a policy other than none"
            )
        return self

    def image_shape(self) -> tuple[int, int, int] | None:
        """Return [C, H, W] if this section alone decides it, else None."""
        native = self.source.native_shape or (None, None, None)
        channels = {"auto": native[0], "grey": 1, "rgb": 3}[self.channels]
        height, width = (self.resolution, self.resolution) if self.resolution else native[1:]
        return (channels, height, width) if channels and height and width else None

    def input_shape(self) -> tuple[int, int, int] | None:
        """Return [C, H, W] of what networks see, images or latents, if it is known before `prepare`, else None.

        Raises ValueError for an autoencoder that does not take the images.
        """
        shape = self.image_shape()
        return self.latents.shape_of(shape) if shape and self.latents else shape

    def bring(self, monitor: Monitor) -> None:
        """Download and read for their hashes, before a GPU is held, the inputs that have checksums."""
        self.source.bring(monitor)
        if self.latents:
            self.latents.bring()


def prepare(data: Data, out_dir: Path, monitor: Monitor) -> None:
    """Write both splits, preview.png, latents if asked for, and last dataset.json, which marks the data set complete.
    Raises UserError, naming the file, if images are unavailable, unreadable or cannot be brought to one shape.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "dataset.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="cm-prepare-") as scratch:
        autoencoder = data.latents.find(Path(scratch) / "autoencoder", monitor) if data.latents else None
        contents = data.source.read(Path(scratch), monitor)
        splits = _choose_splits(contents, data)
        shape = _common_shape(splits["train"] + splits["heldout"], data, monitor)
        each = math.prod(shape) + (autoencoder.stored_bytes((shape[2], *shape[:2])) if autoencoder else 0)
        _refuse_full_disk(out_dir, sum(map(len, splits.values())) * each)
        written = {split: _write_split(split, splits[split], shape, data, out_dir, monitor) for split in splits}
        skipped = _skipped(written, data)
        latents = write_latents(autoencoder, out_dir, monitor) if autoencoder else None
    counts = {split: len(one.kept) for split, one in written.items()}
    counts |= {trait: sum(one.traits[trait] for one in written.values()) for trait in TRAITS}
    counts |= {"skipped": len(skipped), "ignored_files": len(contents.ignored)}
    facts = _facts(data, contents, shape, counts) | {"skipped": list(map(str, skipped))}
    facts |= {"sha256": {split: _sha256(out_dir, split) for split in splits}, "latents": latents}
    names = [f"{split}: {item.name}" for split, one in written.items() for item in one.kept]
    originals = {"sizes": Counter[str](), "modes": Counter[str]()}
    for one in written.values():
        originals["sizes"] += one.sizes
        originals["modes"] += one.modes
    write_data_report(out_dir, facts, contents.ignored, names, originals, monitor)
    (out_dir / "dataset.json").write_text(json.dumps(facts, indent=2) + "\n")


def _skipped(written: "dict[str, _Written]", data: Data) -> list[UserError]:
    """Return the faults of the images that are left out; raise UserError if the recipe refuses such, or all are."""
    faults = [fault for one in written.values() for fault in one.faults]
    count = len(faults) + sum(len(one.kept) for one in written.values())
    if faults and data.damaged == "refuse":
        raise list_faults(faults, count, "mend or remove them, or set data.damaged=skip to leave them out")
    if not written["train"].kept:
        raise list_faults(faults, count, "no image is left to train on")
    return faults


def _facts(data: Data, contents: Contents, shape: tuple[int, int, int], counts: dict[str, int]) -> dict[str, Any]:
    return {
        "name": data.source.dataset_name(),
        "image_shape": [shape[2], *shape[:2]],
        "num_classes": len(contents.class_names),
        "class_names": contents.class_names,
        "label_gaps": contents.label_gaps,
        "counts": counts,
        "heldout": "part of each class, by a hash of the names" if contents.heldout is None else "as in the source",
        "unused_splits": contents.unused,
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
    if (shape := data.image_shape()) and (data.resize != "none" or data.source.native_shape):
        return *shape[1:], shape[0]
    found = list(map_images(lambda index: _read_header(items[index]), len(items), monitor, "headers"))
    headers = {item.where: header for item, header in zip(items, found, strict=True) if isinstance(header, tuple)}
    if not headers:
        raise list_faults([one for one in found if isinstance(one, UserError)], len(items), "no image is left")
    grey = data.channels == "grey" or (
        data.channels == "auto" and all(colourless for _, colourless in headers.values())
    )
    side = data.resolution
    width, height = (side, side) if side else next(iter(headers.values()))[0]
    others = [where for where, (size, _) in headers.items() if size != (width, height)]
    if others and data.resize == "none":
        found_width, found_height = headers[others[0]][0]
        raise UserError(
            f"{others[0]}: is {found_width}x{found_height} pixels, where {width}x{height} are expected ({len(others)}"
            f" of {len(headers)} images differ); set data.resolution and data.resize to bring all to one size"
        )
    return height, width, 1 if grey else 3


def _read_header(item: Item) -> tuple[tuple[int, int], bool]:
    with item.open() as image:
        return upright_size(image, item.where), is_grey(image)


class _Written(NamedTuple):
    """A split as written: its items, the faults of those left out, and counts of the images as they were."""

    kept: list[Item]
    faults: list[UserError]
    traits: Counter[str]
    sizes: Counter[str]
    modes: Counter[str]


def _write_split(
    split: str, items: list[Item], shape: tuple[int, int, int], data: Data, out_dir: Path, monitor: Monitor
) -> _Written:
    """Decode into {split}_images.npy and write {split}_labels.npy, of the images that can be used."""
    path = out_dir / f"{split}_images.npy"
    images = new_array(path, (len(items), *shape))

    how = {"channels": shape[2], **data.model_dump(include={"resize", "resolution", "background", "colours"})}

    def decode(index: int) -> tuple[set[str], str, str]:
        where = items[index].where
        with items[index].open() as image:
            size, mode = f"{image.width}x{image.height}", f"{image.format or 'array'} {image.mode}"
            pixels, traits = convert(image, where, **how)
        if pixels.shape != shape:  # the header promised another size
            raise UserError(f"{where}: decodes to {list(pixels.shape)}, where {list(shape)} is expected")
        images[index] = pixels
        return traits, size, mode

    written = _Written([], [], Counter(), Counter(), Counter())
    kept: list[int] = []
    for index, found in enumerate(map_images(decode, len(items), monitor, f"{split} images")):
        if isinstance(found, UserError):
            written.faults.append(found)
            continue
        kept.append(index)
        written.kept.append(items[index])
        traits, size, mode = found
        written.traits.update(traits)
        written.sizes[size] += 1
        written.modes[mode] += 1
    images.flush()
    if written.faults:
        _keep_alone(path, kept)
    np.save(out_dir / f"{split}_labels.npy", np.array([item.label for item in written.kept], dtype=np.int64))
    return written


def _keep_alone(path: Path, kept: list[int]) -> None:
    """Rewrite an array with the rows `kept`."""
    images, partial = np.load(path, mmap_mode="r"), path.with_suffix(".part")
    rows = new_array(partial, (len(kept), *images.shape[1:]))
    for start in range(0, len(kept), COPIED):
        rows[start : start + COPIED] = images[kept[start : start + COPIED]]
    rows.flush()
    partial.replace(path)


def _refuse_full_disk(out_dir: Path, needed: int) -> None:
    # Check first: writing to a memory-mapped file on a full disk kills the process without a message.
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise UserError(f"{out_dir}: the prepared images need {needed >> 20} MiB, {free >> 20} MiB are free")


def _sha256(out_dir: Path, split: str) -> str:
    return hashlib.sha256(np.load(out_dir / f"{split}_images.npy", mmap_mode="r")).hexdigest()
