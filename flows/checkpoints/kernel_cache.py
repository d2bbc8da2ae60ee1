"""Compiled kernels in a bucket, shared by workers with the same kind of GPU.

They are native code. An object is loaded only if it is signed, for its own name, with a key that is not in the bucket:
write access to the bucket is no right to run code on the workers. Triton's key for the files of a kernel covers its
code, the compiler and the kind of GPU.
"""

import hmac
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton.runtime.cache import RemoteCacheBackend

from flows.errors import UserError
from flows.settings import Settings
from flows.storage.bucket import Bucket

SIGNATURE = 32  # bytes before an object's own


class KernelBucket(RemoteCacheBackend):
    """The files of one key: from this machine's cache, else from the bucket; if the store fails, Triton compiles."""

    # By this process, for all keys: each request that times out would delay the training. A worker that may only read
    # gives up writing.
    _given_up: set[str] = set()

    def __init__(self, key: str) -> None:
        settings = Settings.read()
        assert settings.kernels and settings.kernels_key, "Triton is told of this class where both are set"
        self._secret = settings.kernels_key.read_bytes()
        self._bucket = Bucket(settings.kernels).below(key)
        self._folder = Path(os.environ["TRITON_CACHE_DIR"]) / key  # Triton's own folder for the key

    def get(self, filenames: list[str]) -> dict[str, bytes]:
        """Return those of the files that exist."""
        found = {name: self._find(name) for name in filenames}
        return {name: data for name, data in found.items() if data is not None}

    def put(self, filename: str, data: bytes) -> None:
        """Upload a file unless another worker has done so."""
        signed = self._signature(filename, data) + data
        self._ask("stored", lambda: self._bucket.write(filename, signed, replacing=None))

    def _find(self, name: str) -> bytes | None:
        path = self._folder / name
        return path.read_bytes() if path.exists() else self._ask("fetched", lambda: self._fetch(name))

    def _fetch(self, name: str) -> bytes | None:
        stored = self._bucket.contents(name)
        if stored is None:
            return None
        signature, data = stored[:SIGNATURE], stored[SIGNATURE:]
        if not hmac.compare_digest(signature, self._signature(name, data)):
            raise UserError(f"{self._bucket.uri}/{name}: not signed with the key of CM_KERNELS_KEY")
        return data

    def _signature(self, name: str, data: bytes) -> bytes:
        return hmac.digest(self._secret, f"{self._bucket.uri}/{name}\0".encode() + data, "sha256")

    def _ask(self, verb: str, request: Callable[[], Any]) -> Any:
        if verb in KernelBucket._given_up:
            return None
        try:
            return request()
        except UserError as error:
            print(f"compiled kernels are not {verb} by this training: {error}", file=sys.stderr, flush=True)
            KernelBucket._given_up.add(verb)
            return None
