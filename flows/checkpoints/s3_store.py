"""Training states in a bucket: published whole, by one worker at a time, continued by any other when that one dies.

    <training>/head.json               who trains under which lease, and the states there are, newest first
    <training>/objects/HOLDER/SHA256   files of states, and the manifests that list them

The head is the last thing written, and only ever replaced by whoever saw its last version. So a torn upload does not
exist, two workers cannot both win a lease, and one that lost its lease cannot publish, however late its request is.
"""

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.errors import UserError
from flows.storage.bucket import Bucket, OnBytes, WrongBytes, sha256_of

HEAD, OBJECTS = "head.json", "objects"
LEASE_SECONDS = 60.0  # without a sign of life, by the store's clock; then another worker takes over
RENEWALS = 3  # in the time of one lease
KEPT = 2  # states
WORKERS = 4  # files of a state on their way at once
PATIENCE = (1, 2, 4, 8)  # seconds between tries of what a run cannot do without
RETRY_EVERY = 8.0  # seconds between tries of what a training can do without for a while
SAY_EVERY = 10.0  # seconds between two lines on a long transfer

Say = Callable[[str], None]


class LeaseLost(RuntimeError):
    """Another worker continues this training; this one must not publish any more."""


@dataclass(frozen=True)
class Head:
    """The one object that decides: everything else counts only if it is reached from here."""

    holder: str | None = None  # who trains: unique to one process
    who: str = ""  # the same for people: host and process
    lease_seconds: float = LEASE_SECONDS
    states: tuple[str, ...] = ()  # keys of manifests, newest first
    finished: dict[str, str] | None = None  # {path: DVC hash} of what the training made
    write: str = field(default_factory=lambda: uuid.uuid4().hex)  # tells our own write from another's

    @classmethod
    def of(cls, data: bytes) -> "Head":
        values = json.loads(data)
        return cls(**{**values, "states": tuple(values["states"])})

    def text(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Stored:
    """A file of a state: where its bytes are, and what they must be."""

    key: str
    sha256: str
    size: int  # bytes


Manifest = dict[str, Stored]  # the files of one state, by their path in it


class Training:
    """The states of one training, which this process may replace as long as it holds the lease."""

    def __init__(self, bucket: Bucket, say: Say) -> None:
        self._bucket, self._say = bucket, say
        self._writing = threading.Lock()  # of the head: renewals and publications come from different threads
        self._head, self._etag = Head(), None
        self._manifests: dict[str, Manifest] = {}  # by key, newest first: the states that can be read
        self._there: set[str] = set()  # keys of objects that are ours to delete
        self.lost: LeaseLost | None = None

    def acquire(self, on_wait: Callable[[], None]) -> None:
        """Take the lease; where another worker holds it, wait until it is returned or runs out."""
        holder = {"holder": uuid.uuid4().hex, "who": f"{socket.gethostname()}:{os.getpid()}"}
        waiting = False
        while not patiently(lambda: self._try_acquire(holder)):
            if not waiting:
                on_wait()
            waiting = True
            time.sleep(LEASE_SECONDS / (2 * RENEWALS))
        self._there = patiently(lambda: {entry.key for entry in self._bucket.entries(f"{OBJECTS}/")})

    def _try_acquire(self, holder: Mapping[str, str]) -> bool:
        found = self._bucket.read(HEAD)
        before = Head.of(found.data) if found else Head()
        if before.holder and found.age <= before.lease_seconds:
            return False
        if before.holder:
            self._say(f"the worker {before.who} gave no sign for {found.age:.0f} s; taking over its training")
        head = replace(before, **holder, lease_seconds=LEASE_SECONDS, finished=None)
        return self._write(head, found.etag if found else None)

    def _write(self, head: Head, replacing: str | None) -> bool:
        """Replace the version of the head that we know; return whether it still was the current one."""
        head = replace(head, write=uuid.uuid4().hex)
        etag = self._bucket.write(HEAD, head.text(), replacing=replacing)
        if etag is None:  # either somebody was faster, or the answer to our own first try was lost
            found = self._bucket.read(HEAD)
            if found is None or Head.of(found.data).write != head.write:
                return False
            etag = found.etag
        self._head, self._etag = head, etag
        return True

    def renew(self) -> None:
        """Give a sign of life. Raises LeaseLost."""
        self._update(lambda head: head)

    def release(self, finished: Mapping[str, str] | None) -> None:
        """Return the lease; with `finished`, say what the training made. Raises LeaseLost."""
        self._update(lambda head: replace(head, holder=None, finished=finished and dict(finished)))

    def _update(self, change: Callable[[Head], Head]) -> None:
        with self._writing:
            if self.lost is None and not self._write(change(self._head), self._etag):
                self.lost = LeaseLost(
                    f"{self._bucket.uri}: another worker has taken this training over; this one publishes nothing more"
                )
        if self.lost:
            raise self.lost

    def restore(self, folder: Path) -> None:
        """Bring the newest undamaged state into `folder`, unless that has it or a newer one.

        Raises UserError where there are states and all are damaged, or the store cannot be reached.
        """
        for name in self._head.states:
            try:
                manifest = patiently(lambda n=name: self._read_manifest(n))
                if newest_step(manifest) > newest_step(list_files(folder)):
                    patiently(lambda m=manifest: self._download(m, folder))
                self._manifests[name] = manifest
            except WrongBytes as error:
                self._say(f"a stored training state is damaged ({error})")
        if self._head.states and not self._manifests:
            raise UserError(f"{self._bucket.uri}: every stored training state is damaged; delete it to train afresh")

    def _read_manifest(self, name: str) -> Manifest:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "manifest.json"
            self._bucket.download(name, path, name.rpartition("/")[2])
            return {file: Stored(**stored) for file, stored in json.loads(path.read_text()).items()}

    def _download(self, manifest: Manifest, folder: Path) -> None:
        """Fetch a state beside the folder and put it in its place whole."""
        progress = _Transfer(self._say, "fetching", sum(stored.size for stored in manifest.values()))
        with _scratch_beside(folder) as scratch:
            _in_parallel(
                lambda p=path, s=stored: self._bucket.download(s.key, scratch / p, s.sha256, progress.add)
                for path, stored in manifest.items()
            )
            drop_folder(folder)
            scratch.rename(folder)

    def publish(self, folder: Path) -> None:
        """Store the state in `folder` as the newest, its manifest after its files. Raises LeaseLost."""
        if self.lost:
            raise self.lost
        known = {stored.sha256: stored for manifest in self._manifests.values() for stored in manifest.values()}
        manifest = {name: self._described(path, known) for name, path in list_files(folder).items()}
        new = {path: stored for path, stored in manifest.items() if stored.sha256 not in known}
        progress = _Transfer(self._say, "storing", sum(stored.size for stored in new.values()))
        _in_parallel(
            lambda p=path, s=stored: self._upload(folder / p, s.key, progress.add) for path, stored in new.items()
        )
        name = self._upload_manifest(manifest)
        kept = dict(list({name: manifest, **self._manifests}.items())[:KEPT])
        self._update(lambda head: replace(head, states=tuple(kept)))
        self._manifests = kept
        self._prune()

    def _described(self, path: Path, known: Mapping[str, Stored]) -> Stored:
        sha256 = sha256_of(path)
        return known.get(sha256) or Stored(self._key(sha256), sha256, path.stat().st_size)

    def _key(self, sha256: str) -> str:
        # Under the holder: a worker that is late, its lease gone, deletes nothing that another has stored.
        return f"{OBJECTS}/{self._head.holder}/{sha256}"

    def _upload_manifest(self, manifest: Manifest) -> str:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "manifest.json"
            path.write_text(json.dumps({file: asdict(stored) for file, stored in manifest.items()}))
            name = self._key(sha256_of(path))
            self._upload(path, name, lambda count: None)
        return name

    def _upload(self, path: Path, key: str, on_bytes: OnBytes) -> None:
        self._there.add(key)
        self._bucket.upload(path, key, on_bytes)

    def _prune(self) -> None:
        """Delete what no kept state needs, but nothing that came after us: by then others may build on it."""
        needed = {*self._manifests, *(s.key for manifest in self._manifests.values() for s in manifest.values())}
        self._bucket.remove(self._there - needed)
        self._there &= needed


def drop_finished(bucket: Bucket, is_stored: Callable[[Mapping[str, str]], bool]) -> list[str]:
    """Remove the trainings that ended, whose outputs are stored and that nobody holds; return their names."""
    names = [entry.key.removesuffix(f"/{HEAD}") for entry in bucket.entries() if entry.key.endswith(f"/{HEAD}")]
    return [name for name in names if _drop(bucket.below(name), is_stored)]


def _drop(bucket: Bucket, is_stored: Callable[[Mapping[str, str]], bool]) -> bool:
    found = bucket.read(HEAD)
    head = Head.of(found.data) if found else Head()
    if head.holder or head.finished is None or not is_stored(head.finished):
        return False
    return remove_training(bucket)


def is_orphan(bucket: Bucket, seconds: float) -> bool:
    """Whether nobody holds a training, and nobody has for so long."""
    found = bucket.read(HEAD)
    return found is not None and found.age > max(seconds, Head.of(found.data).lease_seconds)


def remove_training(bucket: Bucket) -> bool:
    """Remove a training that nobody holds; return whether it was so."""
    found = bucket.read(HEAD)
    if found is None or (Head.of(found.data).holder and found.age <= Head.of(found.data).lease_seconds):
        return False
    # Emptied first: whoever comes now starts afresh instead of finding objects vanish under its hands.
    emptied = bucket.write(HEAD, replace(Head.of(found.data), holder=None, states=()).text(), replacing=found.etag)
    if emptied is None:
        return False
    bucket.remove([entry.key for entry in bucket.entries(f"{OBJECTS}/")])
    return bucket.remove_version(HEAD, emptied)


def newest_step(paths: Iterable[str]) -> str:
    """Return the newest `step-...` folder among relative paths, empty where there is none."""
    return max((path.partition("/")[0] for path in paths if path.startswith("step-")), default="")


def list_files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder by their relative path, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def drop_folder(folder: Path) -> None:
    """Remove the states in a folder, renamed first: a process that is killed meanwhile leaves no torn one behind."""
    doomed = folder.with_name(f"{folder.name}.dropped")
    shutil.rmtree(doomed, ignore_errors=True)  # of such a process
    folder.rename(doomed)
    shutil.rmtree(doomed)


def patiently(action: Callable[[], object]) -> object:
    """Return what `action` does, tried again for a while when the store fails; wrong bytes will not mend."""
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


@contextmanager
def _scratch_beside(folder: Path) -> Iterator[Path]:
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # renamed, unless something went wrong


class _Transfer:
    """Says now and then how far a long transfer is."""

    def __init__(self, say: Say, verb: str, total: int) -> None:
        self._say, self._verb, self._total = say, verb, total
        self._done, self._last, self._counting = 0, time.monotonic(), threading.Lock()

    def add(self, count: int) -> None:
        with self._counting:
            self._done += count
            late = time.monotonic() - self._last >= SAY_EVERY
            if late:
                self._last = time.monotonic()
        if late:
            self._say(f"{self._verb} the training state: {self._done >> 20} of {self._total >> 20} MiB")


class CheckpointUploader:
    """Keeps the lease, and carries states to the bucket while the training goes on; of those waiting the newest."""

    def __init__(self, training: Training, outbox: Path, say: Say) -> None:
        self._training, self._outbox, self._say = training, outbox, say
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._ending, self._failing = False, False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._renew, self._carry)]

    def __enter__(self) -> "CheckpointUploader":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ending, self._waiting = True, None
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def send(self, folder: Path) -> None:
        """Have the newest state in `folder` published soon. Raises LeaseLost, at the latest with the next state."""
        if self._training.lost:
            raise self._training.lost
        snapshot = take_snapshot(folder, self._outbox)
        with self._changed:
            superseded, self._waiting = self._waiting, snapshot
            self._changed.notify_all()
        _discard(superseded)

    def _carry(self) -> None:
        while snapshot := self._next():
            if self._try(lambda s=snapshot: self._training.publish(s)) or not self._put_back(snapshot):
                _discard(snapshot)

    def _next(self) -> Path | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            snapshot, self._waiting = self._waiting, None
            return snapshot

    def _put_back(self, snapshot: Path) -> bool:
        """After a pause let a state wait again; return whether it does, and not a newer one."""
        with self._changed:
            self._changed.wait_for(lambda: self._ending, timeout=RETRY_EVERY)
            if self._waiting or self._ending:
                return False
            self._waiting = snapshot
            return True

    def _renew(self) -> None:
        while not self._ends_within(LEASE_SECONDS / RENEWALS):
            self._try(self._training.renew)

    def _ends_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._ending, timeout=seconds)

    def _try(self, action: Callable[[], None]) -> bool:
        """Do something with the store; say when it starts to fail, and when it works again."""
        try:
            action()
        except LeaseLost as lost:
            self._say(str(lost))
            return True  # there is nothing to try again
        except (UserError, OSError) as error:
            if not self._failing:
                self._say(f"the training goes on, its state is not stored at present: {error}")
            self._failing = True
            return False
        if self._failing:
            self._say("the training state is stored again")
        self._failing = False
        return True


def take_snapshot(folder: Path, outbox: Path) -> Path:
    """Return a folder with the newest state and the log as they are now, cheaply: what is never rewritten is linked."""
    snapshot, files = outbox / uuid.uuid4().hex, list_files(folder)
    for name, path in files.items():
        if name.startswith((f"{newest_step(files)}/", "log/")):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            # The curves are appended to while the snapshot waits.
            (shutil.copy if name.endswith(".jsonl") else os.link)(path, snapshot / name)
    return snapshot


def _discard(snapshot: Path | None) -> None:
    if snapshot:
        shutil.rmtree(snapshot)


@contextmanager
def hold_in_bucket(
    bucket: Bucket, folder: Path, on_wait: Callable[[], None], say: Say, finished: Callable[[], dict[str, str] | None]
) -> Iterator[Callable[[], None]]:
    """Hold the lease of a training whose working copy is `folder`; yield what publishes the state that lies there.

    At the end the last state is published and the lease returned, with what `finished` says that the training made;
    then the folder goes. It stays where the bucket could not be given everything, which is said and no error: another
    run on this machine goes on from it, and outputs that exist need no state any more.
    """
    training, outbox = Training(bucket, say), folder.with_name(f"{folder.name}.outbox")
    training.acquire(on_wait)
    shutil.rmtree(outbox, ignore_errors=True)  # of a run that was killed
    try:
        training.restore(folder)
        with CheckpointUploader(training, outbox, say) as courier:
            yield lambda: courier.send(folder)
    finally:
        if _hand_back(training, folder, outbox, say, finished()):
            drop_folder(folder)
        shutil.rmtree(outbox, ignore_errors=True)


def _hand_back(training: Training, folder: Path, outbox: Path, say: Say, finished: Mapping[str, str] | None) -> bool:
    """Publish the last state and return the lease; say what stands in the way, and return whether nothing did."""
    try:
        if newest_step(list_files(folder)):
            snapshot = take_snapshot(folder, outbox)
            patiently(lambda: training.publish(snapshot))
        patiently(lambda: training.release(finished))
    except LeaseLost as lost:
        say(str(lost))
        return False
    except (UserError, OSError) as error:
        say(f"the last training state is on this machine alone, in {folder}: {error}")
        return False
    return True
