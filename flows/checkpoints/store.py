"""Checkpoints of trainings in flight: folders that outlive a crash, each under its stage's key.

They lie in a folder of this machine or, if $CM_STATE is an address s3://bucket/prefix, in a bucket that every worker
reaches. They are not DVC outputs. A checkpoint is dropped only when DVC's cache holds the outputs of its stage: dropped
at the end of the stage, the training would be lost if DVC then failed to store its outputs.
"""

import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flows.atomic import replace_text, try_lock, wait_lock
from flows.checkpoints import s3_store
from flows.checkpoints.s3_store import LeaseLost, Say, Training, drop_folder, list_files, patiently
from flows.errors import UserError
from flows.settings import Settings
from flows.storage.bucket import Bucket

FINISHED_FILE = "finished.json"
KERNELS = "compiled"  # this machine's copy of shared compiled kernels, beside the checkpoints
RETRY_EVERY = 8.0  # seconds between retries of an upload or a lease renewal
Stored = Callable[[Mapping[str, str]], bool]  # whether DVC's cache has all of {path: hash}


@dataclass(frozen=True)
class Checkpoint:
    """A training's checkpoint, locked for this process."""

    folder: Path
    """The working copy, with the newest complete state when the training begins."""
    publish: Callable[[], None]
    """Upload the newest state in `folder` in the background; raises LeaseLost when another worker has taken over."""


def states_folder(shared_root: Path) -> Path:
    """Return the folder of all checkpoints or their working copies: $CM_STATE, else .cm/states of the workspace."""
    place = Settings.read().state
    return Path(place) if place and not states_bucket() else shared_root / ".cm" / "states"


def states_bucket() -> Bucket | None:
    """Return the bucket that $CM_STATE names, if any."""
    place = Settings.read().state or ""
    return Bucket(place) if "://" in place else None


def share_kernels(shared_root: Path) -> None:
    """Let Triton share compiled kernels with other workers through the bucket of CM_KERNELS, if set.

    Raises UserError if they could not be signed.
    """
    settings = Settings.read()
    if settings.kernels:
        if settings.kernels_key is None:
            raise UserError(
                f"CM_KERNELS={settings.kernels}: kernels are code; set CM_KERNELS_KEY, the file that signs them"
            )
        os.environ.setdefault("TRITON_CACHE_DIR", str(states_folder(shared_root) / KERNELS / "shared"))
        os.environ.setdefault("TRITON_CACHE_MANAGER", "triton.runtime.cache:RemoteCacheManager")
        os.environ.setdefault("TRITON_REMOTE_CACHE_BACKEND", "flows.checkpoints.kernel_cache:KernelBucket")


@contextmanager
def hold_checkpoint(
    shared_root: Path, stage: str, key: str, on_wait: Callable[[], None], say: Say
) -> Iterator[Checkpoint]:
    """Yield the checkpoint of a stage's key, locked for this process; wait while another process trains the same.

    `say` receives remarks on the store. Raises UserError if the store cannot be reached at the start.
    """
    folder, bucket = states_folder(shared_root) / f"{stage}-{key[:16]}", states_bucket()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder).open("w") as lock:
        wait_lock(lock, on_wait)
        folder.mkdir(exist_ok=True)  # the previous holder may have dropped it
        if bucket is None:
            yield Checkpoint(folder, lambda: None)
        else:
            with _hold_in_bucket(Training(bucket.below(folder.name), say), folder, on_wait, say) as publish:
                yield Checkpoint(folder, publish)


@contextmanager
def _hold_in_bucket(
    training: Training, folder: Path, on_wait: Callable[[], None], say: Say
) -> Iterator[Callable[[], None]]:
    """Hold the lease of a training whose working copy is `folder`; yield the function that uploads its newest state.

    On exit, publish the last state, return the lease with the training's outputs and remove the folder. If the upload
    is incomplete, log it and keep the folder: a later run on this machine resumes from it. This is no error, because
    finished outputs need no checkpoint.
    """
    outbox = folder.with_name(f"{folder.name}.outbox")
    training.acquire(on_wait)
    shutil.rmtree(outbox, ignore_errors=True)  # left by a killed run
    try:
        training.restore(folder)
        with CheckpointUploader(training, folder, outbox, say) as uploader:
            yield uploader.send
    finally:
        if _hand_back(training, folder, outbox, say):
            drop_folder(folder)
        shutil.rmtree(outbox, ignore_errors=True)


def _hand_back(training: Training, folder: Path, outbox: Path, say: Say) -> bool:
    """Publish the last state and return the lease; return whether both succeeded, and log why not."""
    try:
        if snapshot := take_snapshot(folder, outbox):
            patiently(lambda: training.publish(snapshot))
        marker = folder / FINISHED_FILE
        finished = json.loads(marker.read_text()) if marker.exists() else None
        patiently(lambda: training.release(finished))
    except LeaseLost as lost:
        say(str(lost))
        return False
    except (UserError, OSError) as error:
        say(f"the last checkpoint is on this machine alone, in {folder}: {error}")
        return False
    return True


class CheckpointUploader:
    """Two threads beside a training: one renews its lease, one uploads the newest state."""

    def __init__(self, training: Training, folder: Path, outbox: Path, say: Say) -> None:
        self._training, self._folder, self._outbox, self._say = training, folder, outbox, say
        self._waiting: Path | None = None  # the newest snapshot, unless its upload has begun
        self._swapping, self._ending = threading.Lock(), threading.Event()
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._renewals = threading.Thread(target=self._renew, daemon=True)
        self._failing = False

    def __enter__(self) -> "CheckpointUploader":
        self._renewals.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._uploads.shutdown(cancel_futures=True)
        self._renewals.join()

    def send(self) -> None:
        """Upload the newest state soon. Raises LeaseLost, at the latest with the state after the loss."""
        if self._training.lost:
            raise self._training.lost
        if superseded := self._swap(take_snapshot(self._folder, self._outbox)):
            shutil.rmtree(superseded)
        upload = self._uploads.submit(self._upload)
        upload.add_done_callback(lambda done: done.cancelled() or done.result())  # an unforeseen error is logged

    def _swap(self, snapshot: Path | None) -> Path | None:
        with self._swapping:
            before, self._waiting = self._waiting, snapshot
            return before

    def _upload(self) -> None:
        if snapshot := self._swap(None):
            while not self._try(partial(self._training.publish, snapshot)):
                if self._ending.wait(RETRY_EVERY) or self._waiting:
                    break  # `_hand_back` publishes the newest state at the end; a retry takes the newer of two
            shutil.rmtree(snapshot)

    def _renew(self) -> None:
        while not self._ending.wait(s3_store.LEASE_SECONDS / s3_store.RENEWALS):
            self._try(self._training.update)

    def _try(self, action: Callable[[], None]) -> bool:
        """Run a request to the store; log when requests begin to fail, and when they work again."""
        try:
            action()
        except LeaseLost as lost:
            self._say(str(lost))
            return True  # nothing to retry
        except (UserError, OSError) as error:
            if not self._failing:
                self._say(f"checkpoint upload fails, retrying every {RETRY_EVERY:g} s; training continues: {error}")
            self._failing = True
            return False
        if self._failing:
            self._say("checkpoint upload works again")
        self._failing = False
        return True


def take_snapshot(folder: Path, outbox: Path) -> Path | None:
    """Return a folder with a snapshot of the newest state (hard links) and the log; None before the first state."""
    from cm_core.checkpoint import LOG, list_states

    states, snapshot = list_states(folder), outbox / uuid.uuid4().hex
    for path in list_files(folder).values() if states else ():
        name = path.relative_to(folder)
        if name.parts[0] in (states[-1].name, LOG):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            # A copy: the training appends to the curves while the snapshot waits.
            (shutil.copy if name.suffix == ".jsonl" else os.link)(path, snapshot / name)
    return snapshot if states else None


def mark_finished(folder: Path, outs: Mapping[str, str]) -> None:
    """Record the outputs of a training, {path: DVC hash}; its checkpoint may now be dropped once they are stored."""
    replace_text(folder / FINISHED_FILE, json.dumps(dict(outs)))


def drop_finished(shared_root: Path, is_stored: Stored) -> list[str]:
    """Remove the checkpoints whose outputs are stored, unless a process holds them; return their locations."""
    dropped = []
    for marker in states_folder(shared_root).glob(f"*/{FINISHED_FILE}"):
        if drop_unheld(marker.parent, partial(lambda file: is_stored(json.loads(file.read_text())), marker)):
            dropped.append(str(marker.parent))
    bucket = states_bucket()
    return dropped + (patiently(lambda: s3_store.drop_finished(bucket, is_stored)) if bucket else [])


def drop_unheld(folder: Path, condition: Callable[[], bool] = lambda: True) -> bool:
    """Remove a checkpoint unless a process holds it or the condition fails; return whether it was removed."""
    with _lock_file(folder).open("w") as lock:
        if try_lock(lock) and condition():
            drop_folder(folder)
            return True
    return False


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")  # beside the folder, which it outlives
