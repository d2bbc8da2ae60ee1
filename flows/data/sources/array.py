"""Pixels from a .npz or .npy array, never from pickles."""

import zipfile
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from pydantic import ConfigDict, Field

from flows.data.archives import refuse_zip_bomb
from flows.data.sources import MAX_CLASSES, Contents, FileSource, array_items, label_gaps
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.fetch import download_dir, fetch
from flows.storage.s3 import public_uri

IMAGE_KEYS = ("images", "arr_0")  # arr_0, arr_1: np.savez's default names, as in the ADM references
LABEL_KEYS = ("labels", "arr_1")


class ArrayFile(FileSource):
    """Images as one uint8 array [N, H, W, C]."""

    model_config = ConfigDict(title="Array file")

    kind: Literal["array"] = "array"
    """An .npz with `images` and, if there are any, `labels` (or `arr_0`, `arr_1`), or an .npy of images alone."""
    path: str = Field(min_length=1)
    """The file: a path, file://, http(s):// or s3://."""
    heldout_path: str | None = None
    """A second file, held out from training; null holds out a part of the first."""

    def dataset_name(self) -> str:
        """Return the name for reports."""
        return self.name or PurePosixPath(self.origin()).stem

    def read(self, scratch: Path, monitor: Monitor) -> Contents:
        """Open the arrays and check their types and shapes."""
        kept = download_dir(self.sha256) if self.sha256 else scratch / "train"
        images, labels = _load(fetch(self.path, kept, sha256=self.sha256, monitor=monitor))
        used = np.unique(labels) if labels is not None else np.array([], int)
        train = array_items(images, _numbered(labels, used, self.origin()), self.origin())
        heldout = None
        if self.heldout_path:
            where = public_uri(self.heldout_path)
            images, heldout_labels = _load(fetch(self.heldout_path, scratch / "heldout", monitor=monitor))
            if (labels is None) != (heldout_labels is None):
                raise UserError(f"{where}: labels in one file and none in the other")
            heldout = array_items(images, _numbered(heldout_labels, used, where), where)
        names = used.tolist()
        return Contents(train, heldout, tuple(map(str, names)), label_gaps=label_gaps(names))


def _numbered(labels: np.ndarray | None, used: np.ndarray, where: str) -> np.ndarray | None:
    """Return the place of each label among the `used` ones, those of the training images."""
    if labels is None:
        return None
    if len(foreign := np.flatnonzero(~np.isin(labels, used))):
        raise UserError(f"{where}[{foreign[0]}]: no training image is of the class {labels[foreign[0]]}")
    return np.searchsorted(used, labels)


def _load(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        if zipfile.is_zipfile(path):
            refuse_zip_bomb(path)
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _checked_images(path, loaded), None
        images = next((loaded[key] for key in IMAGE_KEYS if key in loaded), None)
        labels = next((loaded[key] for key in LABEL_KEYS if key in loaded), None)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npy or .npz without pickles ({error})") from error
    if images is None:
        raise UserError(f"{path}: holds {', '.join(loaded.files)}; allowed are {' or '.join(IMAGE_KEYS)} for images")
    images = _checked_images(path, images)
    return images, None if labels is None else _checked_labels(path, labels, len(images))


def _checked_images(path: Path, images: np.ndarray) -> np.ndarray:
    found = f"{path}: images are {images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8:
        raise UserError(f"{found}; allowed is uint8 0..255, of floats in 0..1 np.rint(x * 255).astype(np.uint8)")
    if images.ndim == 4 and images.shape[3] not in (1, 3) and images.shape[1] in (1, 3):
        raise UserError(f"{found}, channels first; allowed is [N, H, W, C], here x.transpose(0, 2, 3, 1)")
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(f"{found}; allowed is [N, H, W, C] with C = 1 (of grey [N, H, W] take x[..., None]) or 3")
    return images


def _checked_labels(path: Path, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(
            f"{path}: labels are {labels.dtype} {list(labels.shape)}; allowed are integers [{count}], of one-hot rows"
            " x.argmax(1)"
        )
    if count and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise UserError(f"{path}: labels from {labels.min()} to {labels.max()}; allowed are 0 to {MAX_CLASSES - 1}")
    return labels
