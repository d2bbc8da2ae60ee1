"""The section `data.latents`, and the latents of prepared images: encoded once, standardised, with their decoder."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from cm_core.params import Params
from flows.data.new_array import new_array
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.fetch import is_local, local_path
from flows.storage.locate import checksum, locate

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "heldout")
MOMENTS = 2  # mean and standard deviation of each number of a latent
STANDARDISED = 1024  # latents at a time


class Encoding(Params):
    """Networks learn the latents of an autoencoder, and its decoder makes images of what they draw (2112.10752)."""

    model_config = ConfigDict(title="Latents")

    autoencoder: str = Field(min_length=1)
    """Folder of an AutoencoderKL of diffusers, config.json and safetensors: a path, or s3:// with a slash at the end.
    Needs the package diffusers."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Checksum of the folder's files; of a local one it is recorded by itself."""
    mean: tuple[float, ...] | None = None
    """Of each channel, with `std`: those of a model that is imported; empty: measured over the training images."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Of each channel."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if len(self.mean or ()) != len(self.std or ()):
            raise ValueError("data.latents.mean and data.latents.std have one value a channel, or are both empty")
        return self

    def shape_of(self, pixel_shape: tuple[int, int, int], folder: Path | None = None) -> tuple[int, int, int] | None:
        """Return [C, h, w] of the latents of images [C, H, W] if the autoencoder lies in `folder` or here, else None.

        Raises ValueError for an autoencoder that does not take them.
        """
        from cm_core.latents import latent_shape, read_config

        here = folder or (local_path(self.autoencoder) if is_local(self.autoencoder) else None)
        if here is None or not here.is_dir():
            return None
        try:
            shape = latent_shape(read_config(here), pixel_shape)
        except ValueError as error:
            raise ValueError(f"data.latents.autoencoder: {error}") from error
        if self.mean is not None and len(self.mean) != shape[0]:
            raise ValueError(f"data.latents.mean has {len(self.mean)} values; the latents have {shape[0]} channels")
        return shape

    def bring(self) -> None:
        """Read a local folder for its checksum, which is then on record."""
        if is_local(self.autoencoder) and (folder := local_path(self.autoencoder)).is_dir():
            checksum(folder)

    def find(self, into: Path, monitor: Monitor) -> "Encoder":
        """Return the autoencoder, not loaded yet. Raises UserError if it or the package it needs cannot be had."""
        from cm_core.latents import check_package, read_config

        folder, _ = locate(self.autoencoder, into, self.sha256, monitor)
        try:
            read_config(folder)
            check_package()
        except ValueError as error:
            raise UserError(f"data.latents.autoencoder: {error}") from error
        return Encoder(self, folder)


@dataclass(frozen=True)
class Encoder:
    """An autoencoder in a local folder."""

    encoding: Encoding
    folder: Path

    def stored_shape(self, pixel_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Return [2, C, h, w] of what is stored of an image; raise UserError if the autoencoder does not take it."""
        try:
            return MOMENTS, *(self.encoding.shape_of(pixel_shape, self.folder) or ())
        except ValueError as error:
            raise UserError(str(error)) from error

    def stored_bytes(self, pixel_shape: tuple[int, int, int]) -> int:
        """Return what is written of an image; raise UserError if the autoencoder does not take it."""
        return math.prod(self.stored_shape(pixel_shape)) * np.dtype(np.float32).itemsize


def write_latents(encoder: Encoder, out_dir: Path, monitor: Monitor) -> dict[str, Any]:
    """Write {split}_latents.npy, float32 [N, 2, C, h, w], and the decoder; return the entry of dataset.json.

    They are mean and standard deviation of each image's posterior, from which every epoch draws anew, scaled so that
    drawn latents of the training images have mean 0 and standard deviation 0.5 in each channel (EDM2, 2312.02696).
    Raises UserError for an autoencoder that is damaged or whose latents are not finite.
    """
    import torch

    from cm_core.latents import DECODER_FILE, Latents, load_autoencoder, write_decoder
    from cm_core.precision import set_float32_products

    set_float32_products("fp32")
    encoding = encoder.encoding
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = {split: np.load(out_dir / f"{split}_images.npy", mmap_mode="r") for split in SPLITS}
    height, width, channels = images["train"].shape[1:]
    try:
        autoencoder = load_autoencoder(encoder.folder, device)
    except ValueError as error:
        raise UserError(f"data.latents.autoencoder: {error}") from error
    shape = encoder.stored_shape((channels, height, width))
    latents = {
        split: _encode_split(autoencoder, images[split], out_dir / f"{split}_latents.npy", shape, device, monitor)
        for split in SPLITS
    }
    given = (encoding.mean, encoding.std) if encoding.mean and encoding.std else None
    mean, std = map(np.array, given or _measure(latents["train"]))
    for array in latents.values():
        _standardise(array, mean, std)
    decoder = write_decoder(autoencoder, out_dir / DECODER_FILE)
    found = Latents(decoder=decoder, pixel_shape=(channels, height, width), mean=mean.tolist(), std=std.tolist())
    return found.model_dump(mode="json")


def _encode_split(
    autoencoder: Any, images: np.ndarray, path: Path, shape: tuple[int, ...], device: "torch.device", monitor: Monitor
) -> np.memmap:
    from cm_core.latents import encode, images_at_once

    latents = new_array(path, (len(images), *shape), np.float32)
    count = images_at_once((images.shape[3], *images.shape[1:3]))
    for start in range(0, len(images), count):
        pixels = np.array(images[start : start + count])
        found = encode(autoencoder, pixels, device).cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError(
                f"data.latents.autoencoder: {path.stem}: its latents of the images from {start} are not finite"
            )
        latents[start : start + count] = found
        monitor.progress(start + len(found), len(images), f"latents of {path.stem.split('_')[0]} images")
    return latents


def _measure(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of drawn latents by channel, float64 [C]."""
    total = squares = np.zeros(latents.shape[2])
    for part in _parts(latents):
        mean, std = part[:, 0].astype(np.float64), part[:, 1].astype(np.float64)
        total = total + mean.sum((0, 2, 3))
        squares = squares + (mean**2 + std**2).sum((0, 2, 3))
    count = len(latents) * latents[0, 0, 0].size
    mean = total / count
    return mean, np.sqrt(squares / count - mean**2)


def _standardise(latents: np.memmap, mean: np.ndarray, std: np.ndarray) -> None:
    from cm_core.latents import SPREAD

    shift, scale = mean[:, None, None], (SPREAD / std)[:, None, None]
    for part in _parts(latents):
        part[:, 0] = (part[:, 0] - shift) * scale
        part[:, 1] *= scale.astype(np.float32)
    latents.flush()


def _parts(latents: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(latents), STANDARDISED):
        yield latents[start : start + STANDARDISED]
