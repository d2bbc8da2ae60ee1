"""Objects below an s3:// address: atomic, verified by checksum on both ends, replaced conditionally by version."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from flows.errors import UserError
from flows.storage.digests import file_digest
from flows.storage.s3 import list_objects, s3_address, s3_client, s3_errors, sends_checksums

PART = 8 * 2**20  # bytes; larger files are transferred in such parts, in parallel
PART_WORKERS = 4
TRIES = 2  # attempts to download an object whose bytes arrive damaged
CONFLICT_PAUSES = (0.1, 0.5, 2.0)  # seconds between tries of a conditional request that met another one
DELETED_AT_ONCE = 1000  # S3's limit

OnBytes = Callable[[int], None]  # bytes transferred since the last call


class WrongBytes(UserError):
    """An object is missing, or holds other bytes than were stored under its name."""


@dataclass(frozen=True)
class Found:
    """A small object as stored."""

    data: bytes
    etag: str
    age: float  # seconds since it was written, both times by the store's clock


@dataclass(frozen=True)
class Entry:
    """An object in a listing."""

    key: str
    size: int
    modified: datetime


class Bucket:
    """The objects below one address; keys are relative to it. Every failure is a UserError that names the object."""

    def __init__(self, uri: str, client: Any = None) -> None:
        self.uri = uri.rstrip("/")
        self._bucket, prefix = s3_address(self.uri)
        self._prefix = prefix and prefix + "/"
        with s3_errors(self.uri):
            self._client = client or s3_client()

    def below(self, folder: str) -> "Bucket":
        """Return the objects below a folder."""
        return Bucket(f"{self.uri}/{folder}", self._client)

    @contextmanager
    def _naming(self, key: str) -> Iterator[dict[str, str]]:
        with s3_errors(f"{self.uri}/{key}"):
            from botocore.exceptions import FlexibleChecksumError

            try:
                yield {"Bucket": self._bucket, "Key": self._prefix + key}
            except FlexibleChecksumError as error:
                raise WrongBytes(f"{self.uri}/{key}: {error}") from error

    def read(self, key: str) -> Found | None:
        """Return a small object, or None if there is none."""
        with self._naming(key) as named:
            try:
                answer = self._client.get_object(**named)
            except self._client.exceptions.NoSuchKey:
                return None
            with answer["Body"] as stream:
                data = stream.read()
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Found(data, answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def contents(self, key: str) -> bytes | None:
        """Return the bytes of a small object, or None if there is none."""
        found = self.read(key)
        return found.data if found else None

    def write(self, key: str, data: bytes, *, replacing: str | None) -> str | None:
        """Write a small object if its current ETag is `replacing` (None: if there is none yet).

        Return the new ETag, or None if another write came first.
        """
        condition = {"IfNoneMatch": "*"} if replacing is None else {"IfMatch": replacing}
        with self._naming(key) as named:
            return self._conditional(lambda: self._client.put_object(**named, Body=data, **condition)["ETag"])

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, whatever is there."""
        with self._naming(key) as named:
            self._client.put_object(**named, Body=data)

    def move(self, key: str, to: str) -> None:
        """Copy an object, whatever its size, to another key of this bucket, then delete it."""
        with self._naming(key) as source, self._naming(to) as target:
            self._client.copy(source, target["Bucket"], target["Key"])
        self.remove([key])

    def remove_version(self, key: str, etag: str) -> bool:
        """Delete an object if it still has this version; return whether it was deleted."""
        with self._naming(key) as named:
            deleted = self._conditional(lambda: self._client.delete_object(**named, IfMatch=etag))
        return deleted is not None

    def _conditional(self, request: Callable[[], Any]) -> Any:
        """Return the answer to a request, or None if its condition does not hold."""
        from botocore.exceptions import ClientError

        for pause in (*CONFLICT_PAUSES, None):
            try:
                return request()
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code in ("PreconditionFailed", "NoSuchKey"):
                    return None
                if code != "ConditionalRequestConflict" or pause is None:
                    raise
            time.sleep(pause)  # another request to the object was under way: whether the condition holds is not known

    def upload(self, path: Path, key: str, on_bytes: OnBytes = lambda count: None) -> None:
        """Upload a file, large ones in parallel parts, then compare its checksum. Raises WrongBytes.

        A store that computes SHA-256 rejects altered bytes itself; the comparison is for stores that do not.
        """
        extra, config = {"ChecksumAlgorithm": "SHA256"} if sends_checksums(self._client) else {}, _transfer()
        with self._naming(key) as named:
            with path.open("rb") as file:
                self._client.upload_fileobj(
                    file, named["Bucket"], named["Key"], ExtraArgs=extra, Config=config, Callback=on_bytes
                )
            stored = self._client.head_object(**named)
        if stored["ContentLength"] != path.stat().st_size or stored["ETag"].strip('"') != _etag(path):
            self._read_back(key, path)

    def _read_back(self, key: str, path: Path) -> None:
        """Compare the stored bytes with the file: not every store's ETag is an MD5."""
        stored = hashlib.sha256()
        with self._naming(key) as named:
            for chunk in self._client.get_object(**named)["Body"].iter_chunks(PART):
                stored.update(chunk)
        if stored.hexdigest() != file_digest(path):
            raise WrongBytes(f"{self.uri}/{key}: the store holds other bytes than were sent")

    def download(self, key: str, path: Path, sha256: str | None, on_bytes: OnBytes = lambda count: None) -> None:
        """Download an object; the file appears once complete and, if given, its SHA-256 is right. Raises WrongBytes."""
        partial = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._fetch(key, partial, sha256, on_bytes)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _fetch(self, key: str, path: Path, sha256: str | None, on_bytes: OnBytes, tries: int = TRIES) -> None:
        from botocore.exceptions import ClientError

        try:
            with self._naming(key) as named, path.open("wb") as file:
                try:
                    where = named["Bucket"], named["Key"]
                    self._client.download_fileobj(*where, file, Config=_transfer(), Callback=on_bytes)
                except ClientError as error:
                    if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                        raise WrongBytes(f"{self.uri}/{key}: no such object") from error
                    raise
            if sha256 is not None and (found := file_digest(path)) != sha256:
                raise WrongBytes(f"{self.uri}/{key}: sha256 is {found}, expected {sha256}")
        except WrongBytes:
            if tries == 1:
                raise
            self._fetch(key, path, sha256, on_bytes, tries - 1)

    def entries(self, folder: str = "") -> Iterator[Entry]:
        """Yield the objects below a folder."""
        prefix = self._prefix + folder
        with s3_errors(f"{self.uri}/{folder}"):
            for entry in list_objects(self._client, self._bucket, prefix):
                yield Entry(entry["Key"].removeprefix(self._prefix), entry["Size"], entry["LastModified"])

    def remove(self, keys: Iterable[str]) -> None:
        """Delete objects; absent ones are no error."""
        named = [{"Key": self._prefix + key} for key in keys]
        for start in range(0, len(named), DELETED_AT_ONCE):
            with s3_errors(self.uri):
                batch = {"Objects": named[start : start + DELETED_AT_ONCE], "Quiet": True}
                refused = self._client.delete_objects(Bucket=self._bucket, Delete=batch).get("Errors", ())
            for error in refused:
                raise UserError(f"s3://{self._bucket}/{error['Key']}: cannot be deleted ({error['Code']})")

    def open_uploads(self) -> list[tuple[str, str, datetime]]:
        """Return (key, upload id, start) of incomplete multipart uploads, which occupy space invisibly."""
        with s3_errors(self.uri):
            pages = self._client.get_paginator("list_multipart_uploads")
            found = [
                upload
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix)
                for upload in page.get("Uploads", ())
            ]
        return [(one["Key"].removeprefix(self._prefix), one["UploadId"], one["Initiated"]) for one in found]

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Abort an incomplete upload and drop its parts."""
        with self._naming(key) as named:
            self._client.abort_multipart_upload(**named, UploadId=upload_id)


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=PART_WORKERS)


def _etag(path: Path) -> str:
    """Return the ETag of an unencrypted file on S3: its MD5, or the MD5 of its parts' MD5s and their number."""
    with path.open("rb") as file:
        parts = [hashlib.md5(part, usedforsecurity=False) for part in iter(lambda: file.read(PART), b"")]
    if path.stat().st_size < PART:
        return parts[0].hexdigest() if parts else hashlib.md5(usedforsecurity=False).hexdigest()
    joined = b"".join(part.digest() for part in parts)
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"
