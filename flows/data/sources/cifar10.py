"""CIFAR-10 from its official archive, without trusting the pickles in it."""

import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from flows.data.archives import Files, archive_files, contents
from flows.data.sources import Contents, Source, array_items
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.fetch import download_dir, fetch_first
from flows.storage.s3 import public_uri


class Cifar10(Source):
    """60,000 photographs of ten kinds of things, 32x32 RGB; the archive's own test batch is held out."""

    native_shape: ClassVar = (3, 32, 32)
    model_config = ConfigDict(title="CIFAR-10")

    kind: Literal["cifar10"] = "cifar10"
    """The official archive, python version."""
    urls: tuple[str, ...] = Field(("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",), min_length=1)
    """Where to look for cifar-10-python.tar.gz, in this order: a path, file://, http(s):// or s3://."""
    md5: str = Field("c58f30108f718f92721af3b95e74349a", pattern="^[0-9a-fA-F]{32}$")
    """MD5 of the archive, 32 hexadecimal digits; the default is the one that its authors publish."""
    licence: str = "none stated; the authors ask to cite Krizhevsky, Learning Multiple Layers of Features, 2009"
    """One line on the terms of use, repeated in dataset.json."""

    def origin(self) -> str:
        """Return the source's entry for dataset.json."""
        return ", ".join(public_uri(url) for url in self.urls)

    def bring(self, monitor: Monitor) -> None:
        """As of every source: the archive."""
        self._archive(monitor)

    def _archive(self, monitor: Monitor) -> Path:
        return fetch_first(self.urls, download_dir(self.md5), md5=self.md5, monitor=monitor)

    def read(self, scratch: Path, monitor: Monitor) -> Contents:
        """Fetch, verify and decode the archive; the download is kept for later runs."""
        archive = self._archive(monitor)
        files = {PurePosixPath(name).name: read for name, read in archive_files(archive, scratch).items()}
        train = sorted(name for name in files if name.startswith("data_batch_"))
        if not train or not {"test_batch", "batches.meta"} <= files.keys():
            raise UserError(f"{archive}: lacks data_batch_*, test_batch or batches.meta; is it the python version?")
        (label_names,) = _entries(archive, files, "batches.meta", b"label_names")
        class_names = tuple(name.decode() for name in label_names)
        splits = [_read_batches(archive, files, names, len(class_names)) for names in (train, ["test_batch"])]
        return Contents(array_items(*splits[0], "train"), array_items(*splits[1], "test"), class_names)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays and plain containers that refuses everything else: a pickle can call any function."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _entries(archive: Path, files: Files, name: str, *keys: bytes) -> list[Any]:
    """Return entries of a batch that Python 2 pickled: strings, keys included, are bytes."""
    try:
        entries = _ArrayUnpickler(io.BytesIO(contents(files[name])), encoding="bytes").load()
        return [entries[key] for key in keys]
    except Exception as error:  # on arbitrary bytes an unpickler raises more than UnpicklingError
        raise UserError(f"{archive}: {name} is no batch of CIFAR-10 ({error})") from error


def _read_batches(archive: Path, files: Files, names: list[str], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images [N, 32, 32, 3] and labels [N] of some batches, in order."""
    images, labels = [], []
    for name in names:
        rows, batch_labels = map(np.asarray, _entries(archive, files, name, b"data", b"labels"))
        if rows.dtype != np.uint8 or rows.shape != (len(batch_labels), 3072):
            raise UserError(
                f"{archive}: {name} holds {rows.dtype} {list(rows.shape)} and {len(batch_labels)} labels,"
                " expected uint8 [N, 3072] and N labels"
            )
        if batch_labels.min(initial=0) < 0 or batch_labels.max(initial=0) >= num_classes:
            raise UserError(f"{archive}: {name} has labels outside 0..{num_classes - 1}")
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(batch_labels)
    return np.concatenate(images), np.concatenate(labels)
