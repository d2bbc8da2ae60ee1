"""Training states in flight: folders that outlive a crash, each under the key of the stage that trains.

They lie in a folder of this machine or, where $CM_STATE is an address s3://bucket/prefix, in a bucket that every worker
reaches. They are no DVC outputs. One is dropped once DVC's cache has what its stage made: dropping it when the stage
ends would lose a training that DVC then fails to store.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.atomic import replace_text, try_lock
from flows.checkpoints import s3_store
from flows.settings import Settings
from flows.storage.bucket import Bucket

FINISHED_FILE = "finished.json"
KERNELS_VARIABLE, KERNELS = "CM_KERNELS", "compiled"  # where compiled kernels are shared: beside the states
Stored = Callable[[Mapping[str, str]], bool]  # whether DVC's cache has all of {path: hash}


@dataclass(frozen=True)
class HeldState:
    """A training's state, ours alone for the time being."""

    folder: Path
    """The working copy, with the newest complete state when the training begins."""
    publish: Callable[[], None]
    """Send the newest state in `folder` on its way to the other workers; raises LeaseLost when one has taken over."""


def states_folder(origin: Path) -> Path:
    """Return the folder of all states, or of their working copies: $CM_STATE, else .cm/states of the workspace."""
    place = Settings.read().state
    return Path(place) if place and not states_bucket() else origin / ".cm" / "states"


def states_bucket() -> Bucket | None:
    """Return the bucket that $CM_STATE names, if it names one."""
    place = Settings.read().state or ""
    return Bucket(place) if "://" in place else None


def share_kernels(origin: Path) -> None:
    """Let Triton find in the bucket of the states, if there is one, what other workers compiled, and leave its own."""
    if bucket := states_bucket():
        os.environ.setdefault(KERNELS_VARIABLE, f"{bucket.uri}/{KERNELS}")
        os.environ.setdefault("TRITON_CACHE_DIR", str(states_folder(origin) / KERNELS / "shared"))
        os.environ.setdefault("TRITON_CACHE_MANAGER", "triton.runtime.cache:RemoteCacheManager")
        os.environ.setdefault("TRITON_REMOTE_CACHE_BACKEND", "flows.checkpoints.kernel_cache:KernelBucket")


@contextmanager
def hold_state(
    origin: Path, stage: str, key: str, on_wait: Callable[[], None], say: Callable[[str], None]
) -> Iterator[HeldState]:
    """Yield the state of a stage's key, ours alone; where another process trains the same, wait for its end.

    `say` gets remarks on the store. Raises UserError where the store cannot be reached at the start.
    """
    folder, bucket = states_folder(origin) / f"{stage}-{key[:16]}", states_bucket()
    with _hold_folder(folder, on_wait):
        if bucket is None:
            yield HeldState(folder, lambda: None)
            return
        place = bucket.below(folder.name)
        with s3_store.hold_in_bucket(place, folder, on_wait, say, lambda: _finished(folder)) as publish:
            yield HeldState(folder, publish)


@contextmanager
def _hold_folder(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder).open("w") as lock:
        if not try_lock(lock):
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield


def mark_finished(folder: Path, outs: Mapping[str, str]) -> None:
    """Note what the stage made, {path: DVC hash}; from now on the state waits to be dropped."""
    replace_text(folder / FINISHED_FILE, json.dumps(dict(outs)))


def _finished(folder: Path) -> dict[str, str] | None:
    marker = folder / FINISHED_FILE
    return json.loads(marker.read_text()) if marker.exists() else None


def drop_finished(origin: Path, is_stored: Stored) -> list[str]:
    """Remove the states whose outputs are stored, unless somebody holds them; return what was removed."""
    bucket = states_bucket()
    in_bucket = s3_store.patiently(lambda: s3_store.drop_finished(bucket, is_stored)) if bucket else []
    return [*map(str, _drop_folders(states_folder(origin), is_stored)), *in_bucket]


def _drop_folders(states: Path, is_stored: Stored) -> Iterator[Path]:
    for marker in states.glob(f"*/{FINISHED_FILE}"):
        folder = marker.parent
        with _lock_file(folder).open("w") as lock:
            if try_lock(lock) and is_stored(json.loads(marker.read_text())):
                s3_store.drop_folder(folder)
                yield folder


def drop_unheld(folder: Path) -> bool:
    """Remove a state unless somebody holds it; return whether it is gone."""
    with _lock_file(folder).open("w") as lock:
        if try_lock(lock):
            s3_store.drop_folder(folder)
            return True
    return False


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")  # beside the folder: it outlives it
