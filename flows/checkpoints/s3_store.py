"""Checkpoints in a bucket: published atomically by one worker at a time; another worker resumes if that one dies.

    <training>/head.json               the lease holder and the stored states, newest first
    <training>/objects/HOLDER/SHA256   files of states, and the manifests that list them

The writer updates the head last, by a conditional write over the version it has read. Hence no reader sees a torn
upload, two workers cannot both win a lease, and a worker that lost its lease cannot publish, however late its request.
"""

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from flows.errors import UserError
from flows.storage.bucket import Bucket, OnBytes, WrongBytes
from flows.storage.digests import file_digest

HEAD, OBJECTS = "head.json", "objects"
LEASE_SECONDS = 60.0  # without a heartbeat, by the store's clock; then another worker takes over
RENEWALS = 3  # per lease period
KEPT = 2  # states per training
WORKERS = 4  # parallel transfers of a state's files
PATIENCE = (1, 2, 4, 8)  # seconds between retries of a request that the run depends on
SAY_EVERY = 10.0  # seconds between two progress lines of a long transfer

Say = Callable[[str], None]
Result = TypeVar("Result")


class LeaseLost(RuntimeError):
    """Another worker has resumed this training; this one must stop publishing."""


@dataclass(frozen=True)
class Head:
    """The root object: other objects count only if they are reachable from it."""

    holder: str | None = None  # unique to one process; None: no worker trains
    who: str = ""  # the holder for people: host and process
    lease_seconds: float = LEASE_SECONDS
    states: tuple[str, ...] = ()  # keys of manifests, newest first
    finished: dict[str, str] | None = None  # outputs of the training, {path: DVC hash}
    write: str = field(default_factory=lambda: uuid.uuid4().hex)  # tells our own write from another worker's

    @classmethod
    def of(cls, data: bytes) -> "Head":
        values = json.loads(data)
        return cls(**{**values, "states": tuple(values["states"])})

    def text(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Stored:
    """A file of a state: the key of its bytes and their checksum."""

    key: str
    sha256: str
    size: int  # bytes


Manifest = dict[str, Stored]  # the files of one state, by their path in it


class Training:
    """The checkpoint of one training, which this process may replace while it holds the lease."""

    def __init__(self, bucket: Bucket, say: Say) -> None:
        self._bucket, self._say = bucket, say
        self._writing = threading.Lock()  # guards the head: renewals and publications run in different threads
        self._head = Head()
        self._etag: str | None = None
        self._manifests: dict[str, Manifest] = {}  # the readable states by key, newest first
        self._there: set[str] = set()  # keys of stored objects, which this worker may delete
        self.lost: LeaseLost | None = None

    def acquire(self, on_wait: Callable[[], None]) -> None:
        """Take the lease; if another worker holds it, wait until it is returned or expires."""
        holder = {"holder": uuid.uuid4().hex, "who": f"{socket.gethostname()}:{os.getpid()}"}
        if not patiently(lambda: self._try_acquire(holder)):
            on_wait()
            while not patiently(lambda: self._try_acquire(holder)):
                time.sleep(LEASE_SECONDS / (2 * RENEWALS))
        self._there = patiently(lambda: {entry.key for entry in self._bucket.entries(f"{OBJECTS}/")})

    def _try_acquire(self, holder: Mapping[str, Any]) -> bool:
        found = self._bucket.read(HEAD)
        before = Head.of(found.data) if found else Head()
        if found and before.holder:
            if found.age <= before.lease_seconds:
                return False
            self._say(f"the worker {before.who} gave no sign for {found.age:.0f} s; taking over its training")
        head = replace(before, **holder, lease_seconds=LEASE_SECONDS, finished=None)
        return self._write(head, found.etag if found else None)

    def _write(self, head: Head, replacing: str | None) -> bool:
        """Replace the known version of the head; return whether it was still the current one."""
        head = replace(head, write=uuid.uuid4().hex)
        etag = self._bucket.write(HEAD, head.text(), replacing=replacing)
        if etag is None:  # another write came first, or the reply to our own first attempt was lost
            found = self._bucket.read(HEAD)
            if found is None or Head.of(found.data).write != head.write:
                return False
            etag = found.etag
        self._head, self._etag = head, etag
        return True

    def release(self, finished: Mapping[str, str] | None) -> None:
        """Return the lease; `finished` records the outputs of the training. Raises LeaseLost."""
        self.update(lambda head: replace(head, holder=None, finished=None if finished is None else dict(finished)))

    def update(self, change: Callable[[Head], Head] = lambda head: head) -> None:
        """Write the head, changed or not, which renews the lease. Raises LeaseLost."""
        with self._writing:
            if self.lost is None and not self._write(change(self._head), self._etag):
                self.lost = LeaseLost(
                    f"{self._bucket.uri}: another worker has taken this training over; this one publishes nothing more"
                )
        if self.lost:
            raise self.lost

    def restore(self, folder: Path) -> None:
        """Download the newest undamaged state into `folder`, unless it holds that state or a newer one.

        Raises UserError if all stored states are damaged, or the store cannot be reached.
        """
        from cm_core.checkpoint import newest_state

        for name in self._head.states:
            try:
                manifest = patiently(partial(self._read_manifest, name))
                if newest_state(manifest) > newest_state(list_files(folder)):
                    patiently(partial(self._download, manifest, folder))
                self._manifests[name] = manifest
            except WrongBytes as error:
                self._say(f"a stored checkpoint is damaged ({error})")
        if self._head.states and not self._manifests:
            raise UserError(f"{self._bucket.uri}: every stored checkpoint is damaged; delete them to train from step 0")

    def _read_manifest(self, name: str) -> Manifest:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "manifest.json"
            self._bucket.download(name, path, name.rpartition("/")[2])
            return {file: Stored(**stored) for file, stored in json.loads(path.read_text()).items()}

    def _download(self, manifest: Manifest, folder: Path) -> None:
        """Download a state beside the folder, then rename it into place."""
        on_bytes = _log_transfer(self._say, "download", sum(stored.size for stored in manifest.values()))
        scratch = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
        scratch.mkdir()
        try:
            _in_parallel(
                partial(self._bucket.download, stored.key, scratch / path, stored.sha256, on_bytes)
                for path, stored in manifest.items()
            )
            drop_folder(folder)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # already renamed on success

    def publish(self, folder: Path) -> None:
        """Upload the state in `folder` as the newest, its files before its manifest. Raises LeaseLost."""
        if self.lost:
            raise self.lost
        known = {stored.sha256: stored for manifest in self._manifests.values() for stored in manifest.values()}
        manifest = {name: self._described(path, known) for name, path in list_files(folder).items()}
        new = {path: stored for path, stored in manifest.items() if stored.sha256 not in known}
        on_bytes = _log_transfer(self._say, "upload", sum(stored.size for stored in new.values()))
        _in_parallel(partial(self._upload, folder / path, stored.key, on_bytes) for path, stored in new.items())
        name = self._upload_manifest(manifest)
        kept = dict(list({name: manifest, **self._manifests}.items())[:KEPT])
        self.update(lambda head: replace(head, states=tuple(kept)))
        self._manifests = kept
        self._prune()

    def _described(self, path: Path, known: Mapping[str, Stored]) -> Stored:
        sha256 = file_digest(path)
        return known.get(sha256) or Stored(self._key(sha256), sha256, path.stat().st_size)

    def _key(self, sha256: str) -> str:
        # Under the holder's prefix: a late worker without its lease deletes nothing that another has stored.
        return f"{OBJECTS}/{self._head.holder}/{sha256}"

    def _upload_manifest(self, manifest: Manifest) -> str:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "manifest.json"
            path.write_text(json.dumps({file: asdict(stored) for file, stored in manifest.items()}))
            name = self._key(file_digest(path))
            self._upload(path, name, lambda count: None)
        return name

    def _upload(self, path: Path, key: str, on_bytes: OnBytes) -> None:
        self._there.add(key)
        self._bucket.upload(path, key, on_bytes)

    def _prune(self) -> None:
        """Delete this worker's objects that no kept state needs, none of a later holder: others may build on them."""
        needed = {*self._manifests, *(s.key for manifest in self._manifests.values() for s in manifest.values())}
        self._bucket.remove(self._there - needed)
        self._there &= needed


def drop_finished(bucket: Bucket, is_stored: Callable[[Mapping[str, str]], bool]) -> list[str]:
    """Remove finished trainings whose outputs are stored and whose lease is returned; return their names."""

    def is_over(head: Head) -> bool:
        return not head.holder and head.finished is not None and is_stored(head.finished)

    return [name for name in _trainings(bucket) if remove_training(bucket.below(name), is_over)]


def leases(bucket: Bucket) -> dict[str, float]:
    """Return how long ago the holder of each training's lease has shown life, s, by the store's clock."""
    found = {name: bucket.below(name).read(HEAD) for name in _trainings(bucket)}
    return {name: head.age for name, head in found.items() if head and Head.of(head.data).holder}


def _trainings(bucket: Bucket) -> list[str]:
    return [entry.key.removesuffix(f"/{HEAD}") for entry in bucket.entries() if entry.key.endswith(f"/{HEAD}")]


def is_orphan(bucket: Bucket, seconds: float) -> bool:
    """Whether nobody has held the lease of a training for at least this long."""
    found = bucket.read(HEAD)
    return found is not None and found.age > max(seconds, Head.of(found.data).lease_seconds)


def remove_training(bucket: Bucket, condition: Callable[[Head], bool] = lambda head: True) -> bool:
    """Remove a training that no worker holds, if the condition holds; return whether it was removed."""
    found = bucket.read(HEAD)
    if found is None:
        return False
    head = Head.of(found.data)
    if (head.holder and found.age <= head.lease_seconds) or not condition(head):
        return False
    doomed = [entry.key for entry in bucket.entries(f"{OBJECTS}/")]
    # Empty the head before the objects go: a worker that starts now begins at step 0 and does not lose objects while it
    # reads. Those that it stores were not there when the objects were listed, and stay.
    emptied = bucket.write(HEAD, replace(head, holder=None, states=()).text(), replacing=found.etag)
    if emptied is None:
        return False
    bucket.remove(doomed)
    return bucket.remove_version(HEAD, emptied)


def list_files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder by their relative path, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def drop_folder(folder: Path) -> None:
    """Remove a checkpoint's folder; the rename first means that a killed process leaves no torn one behind."""
    doomed = folder.with_name(f"{folder.name}.dropped")
    shutil.rmtree(doomed, ignore_errors=True)  # left by such a process
    folder.rename(doomed)
    shutil.rmtree(doomed)


def patiently(action: Callable[[], Result]) -> Result:
    """Return the result of `action`, retried for a while if the store fails, but not if its bytes are wrong."""
    for pause in PATIENCE:
        try:
            return action()
        except WrongBytes:
            raise
        except UserError:
            time.sleep(pause)
    return action()


def _in_parallel(actions: Iterable[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        for future in [pool.submit(action) for action in actions]:
            future.result()


def _log_transfer(say: Say, verb: str, total: int) -> OnBytes:
    """Return a thread-safe callback that logs the progress of a long transfer now and then."""
    done, last, counting = 0, time.monotonic(), threading.Lock()

    def add(count: int) -> None:
        nonlocal done, last
        with counting:
            done += count
            due = time.monotonic() - last >= SAY_EVERY
            last = time.monotonic() if due else last
        if due:
            say(f"checkpoint {verb}: {done >> 20} of {total >> 20} MiB")

    return add
