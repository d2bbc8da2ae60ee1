"""A DVC cache or remote, a folder or a bucket, as a store of files under keys."""

import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from flows.storage.bucket import Bucket, Entry


class Folder:
    """A store that is a folder; a Bucket is the other kind."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, folder: str = "") -> Iterator[Entry]:
        """Yield the files below `folder`."""
        for path in (self.root / folder).rglob("*"):
            if path.is_file():
                facts = path.stat()
                modified = datetime.fromtimestamp(facts.st_mtime, UTC)
                yield Entry(path.relative_to(self.root).as_posix(), facts.st_size, modified)

    def contents(self, key: str) -> bytes | None:
        """Return a file's contents, or None if there is no such file."""
        path = self.root / key
        return path.read_bytes() if path.is_file() else None

    def put(self, key: str, data: bytes) -> None:
        """Write a small file."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def move(self, key: str, to: str) -> None:
        """Rename a file, which is new under its other name."""
        path = self.root / to
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).replace(path)
        os.utime(path)

    def remove(self, keys: Iterable[str]) -> None:
        """Delete files."""
        for key in keys:
            (self.root / key).unlink(missing_ok=True)


Store = Folder | Bucket


def open_store(address: str) -> Store | None:
    """Return the store at the address of a DVC remote; None if it is neither a folder nor s3://."""
    if "://" not in address:
        return Folder(Path(address))
    return Bucket(address) if address.startswith("s3://") else None
