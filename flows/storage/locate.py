"""Weights that a recipe names: a file or a folder, local or remote, and their checksum."""

import hashlib
from pathlib import Path

from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.allowed import refuse_foreign
from flows.storage.fetch import fetch, fetch_prefix, is_local, known_digest, local_path
from flows.storage.s3 import public_uri


def locate(uri: str, into: Path, sha256: str | None, monitor: Monitor) -> tuple[Path, str]:
    """Return the local file or folder of a checkpoint, and its `checksum`.

    A folder is local, or s3://.../ with a slash at the end. Raises UserError as `fetch` does.
    """
    if uri.startswith(("models:/", "runs:/")):
        raise UserError(f"{uri}: `cm import {uri}` makes a folder of it that a recipe can name")
    if is_local(uri) and local_path(uri).is_dir():
        path = local_path(uri).resolve()
        refuse_foreign(path)
    elif uri.startswith("s3://") and uri.endswith("/"):
        path = fetch_prefix(uri, into, monitor=monitor)
    else:
        path = fetch(uri, into, monitor=monitor, sha256=sha256)
    found = checksum(path)
    if sha256 not in (None, found):
        raise UserError(f"{public_uri(uri)}: sha256 of its files is {found}, expected {sha256}")
    return path, found


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of its files' names and sums."""
    if path.is_file():
        return known_digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sums = "".join(f"{known_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(sums.encode()).hexdigest()
