"""Download files: local paths, file://, http(s):// and s3://, verified and written atomically."""

import http.client
import os
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.allowed import opener, refuse_foreign
from flows.storage.digests import recorded_digest
from flows.storage.s3 import S3_WORKERS, TIMEOUT, list_objects, public_uri, s3_address, s3_client, s3_errors

CHUNK = 1 << 20  # bytes between progress reports


def fetch(
    uri: str, into: Path, *, sha256: str | None = None, md5: str | None = None, monitor: Monitor | None = None
) -> Path:
    """Return a local file with the contents of `uri`, its checksums verified.

    A local path or file:// URL is used in place. Anything else is downloaded into the folder `into` under its own name,
    unless a file there matches a given checksum. Raises UserError for a missing file, denied access, no network, a
    broken download or a wrong checksum.
    """
    checksums = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    if is_local(uri):
        return _verified(uri, _existing_file(uri), checksums)
    refuse_foreign(uri)
    path = into / _file_name(uri)
    if checksums and path.is_file() and all(known_digest(path, name) == sum for name, sum in checksums.items()):
        return path
    with _temporary_file(into) as partial:
        _download(uri, partial, monitor or Monitor())
        return _verified(uri, partial, checksums).replace(path)


def fetch_first(uris: Sequence[str], into: Path, *, monitor: Monitor | None = None, **checksums: str | None) -> Path:
    """Return `fetch` of the first of `uris` that works; raise UserError, listing each cause, if none works."""
    causes = []
    for uri in uris:
        try:
            return fetch(uri, into, monitor=monitor, **checksums)
        except UserError as error:
            causes.append(str(error))
    raise UserError("; ".join(causes) or "no address to fetch from")


def fetch_prefix(uri: str, into: Path, *, monitor: Monitor | None = None) -> Path:
    """Download every object under `s3://bucket/prefix/` into the folder `into`, keeping the tree below the prefix.

    Raises UserError for an empty prefix, denied access, no network, or a key that points outside `into`.
    """
    refuse_foreign(uri)
    bucket, prefix = s3_address(uri)
    prefix = prefix and prefix.rstrip("/") + "/"
    with s3_errors(uri):
        client = s3_client()
        keys = [entry["Key"] for entry in list_objects(client, bucket, prefix) if not entry["Key"].endswith("/")]
        if not keys:
            raise UserError(f"{public_uri(uri)}: no object under this prefix")
        paths = [into / _relative(uri, key.removeprefix(prefix)) for key in keys]
        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(S3_WORKERS) as pool:
            copies = pool.map(lambda key, path: _copy_object(client, bucket, key, path, Monitor()), keys, paths)
            for done, _ in enumerate(copies, 1):
                (monitor or Monitor()).progress(done, len(keys), "objects")
    return into


def download_dir(checksum: str) -> Path:
    """Return the folder of the user's cache that keeps the download with this checksum between runs."""
    return _kept() / checksum[:16].lower()


def known_digest(path: Path, name: str = "sha256") -> str:
    """Return the checksum of a file, in hexadecimal, from the user's record if the file is unchanged."""
    return recorded_digest(_kept() / "hashes.db", path, name)


def _kept() -> Path:
    """Return this project's folder of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consistency-pipeline"


def is_local(uri: str) -> bool:
    """Whether `uri` is a path or a file:// URL."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """Return the path that a local `uri` names, `~` expanded.

    Raises UserError if the recipe may not read it, or nobody here can: no permission, an endless link, an endless name.
    """
    path = Path(uri).expanduser() if not uri.startswith("file://") else _path_of(uri)
    refuse_foreign(path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # the caller's to say
    except (OSError, ValueError) as error:
        raise UserError(f"{uri}: cannot be read ({getattr(error, 'strerror', error)})") from error
    return path


def _path_of(uri: str) -> Path:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{uri}: a file:// URL names a file of this machine: file:///absolute/path")
    return Path(unquote(parts.path))


def _existing_file(uri: str) -> Path:
    path = local_path(uri)
    if path.is_file():
        return path
    raise UserError(f"{uri}: {'a folder, where a file is expected' if path.is_dir() else 'no such file'}")


def _file_name(uri: str) -> str:
    name = PurePosixPath(unquote(urlsplit(uri).path)).name
    if name in ("", ".."):
        raise UserError(f"{public_uri(uri)}: names no file")
    return name


@contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    """Yield an empty file of `folder`, removed afterwards unless it was renamed."""
    path = folder / f"{uuid.uuid4().hex}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise UserError(f"{folder}: cannot write downloads here ({error.strerror})") from error
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _verified(uri: str, path: Path, checksums: dict[str, str]) -> Path:
    for name, expected in checksums.items():
        if (found := known_digest(path, name)) != expected:
            raise UserError(f"{public_uri(uri)}: {name} is {found}, expected {expected}")
    return path


def _download(uri: str, path: Path, monitor: Monitor) -> None:
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        with _http_errors(uri), opener().open(_request(uri), timeout=TIMEOUT) as response:
            size = response.headers.get("Content-Length")
            _copy(response, int(size) if size else None, path, monitor)
    elif scheme == "s3":
        with s3_errors(uri):
            _copy_object(s3_client(), *s3_address(uri), path, monitor)
    else:
        raise UserError(f"{public_uri(uri)}: unknown scheme; allowed: a path, file://, http://, https://, s3://")


def _request(uri: str) -> urllib.request.Request:
    # Some hosts reject the library's user agent; without "identity" a proxy may compress, and sizes differ.
    headers = {"User-Agent": "consistency-pipeline", "Accept-Encoding": "identity"}
    return urllib.request.Request(uri, headers=headers)


def _copy(stream: BinaryIO, size: int | None, path: Path, monitor: Monitor) -> None:
    """Write `stream` to `path`; a stream that ends before `size` bytes is an error, not a short file."""
    done = 0
    with path.open("wb") as target:
        while chunk := stream.read(CHUNK):
            target.write(chunk)
            done += len(chunk)
            if size:
                monitor.progress(done, size, "bytes")
    if size is not None and done != size:
        raise ConnectionError(f"the connection ended after {done} of {size} bytes")


@contextmanager
def _http_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        raise UserError(f"{public_uri(uri)}: HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise UserError(f"{public_uri(uri)}: cannot be reached ({error.reason})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{public_uri(uri)}: {str(error) or type(error).__name__}") from error


def _copy_object(client: Any, bucket: str, key: str, path: Path, monitor: Monitor) -> None:
    answer = client.get_object(Bucket=bucket, Key=key)
    with answer["Body"] as stream:
        _copy(stream, answer["ContentLength"], path, monitor)


def _relative(uri: str, key: str) -> Path:
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{public_uri(uri)}: the key {key!r} points outside the prefix")
    return Path(path)
