"""Compiled kernels in the checkpoint bucket, shared by workers with the same kind of GPU.

Triton's key for the files of a kernel covers its code, the compiler and the kind of GPU.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton.runtime.cache import RemoteCacheBackend

from flows.errors import UserError
from flows.settings import Settings
from flows.storage.bucket import Bucket


class KernelBucket(RemoteCacheBackend):
    """The files of one key: from this machine's cache, else from the bucket; if the store fails, Triton compiles."""

    _given_up = False  # by this process, for all keys: each request that times out would delay the training

    def __init__(self, key: str) -> None:
        kernels = Settings.read().kernels
        assert kernels is not None, "Triton is told of this class where there is a bucket"
        self._bucket = Bucket(kernels).below(key)
        self._folder = Path(os.environ["TRITON_CACHE_DIR"]) / key  # Triton's own folder for the key

    def get(self, filenames: list[str]) -> dict[str, bytes]:
        """Return those of the files that exist."""
        found = {name: self._find(name) for name in filenames}
        return {name: data for name, data in found.items() if data is not None}

    def put(self, filename: str, data: bytes) -> None:
        """Upload a file unless another worker has done so."""
        self._ask(lambda: self._bucket.write(filename, data, replacing=None))

    def _find(self, name: str) -> bytes | None:
        path = self._folder / name
        return path.read_bytes() if path.exists() else self._ask(lambda: self._bucket.contents(name))

    def _ask(self, request: Callable[[], Any]) -> Any:
        if KernelBucket._given_up:
            return None
        try:
            return request()
        except UserError as error:
            print(f"compiled kernels are not shared by this training: {error}", file=sys.stderr, flush=True)
            KernelBucket._given_up = True
            return None
