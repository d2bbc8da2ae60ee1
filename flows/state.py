"""Training states in flight: folders that outlive a crash, each under the key of the stage that trains.

They are no DVC outputs. One is dropped once DVC's cache has what its stage made: dropping it when the stage ends
would lose a training that DVC then fails to store.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flows.errors import UserError

STATE_VARIABLE, FINISHED_FILE = "CM_STATE", "finished.json"


def states_folder(origin: Path) -> Path:
    """Return the folder of all states: $CM_STATE, else .cm/states of the origin workspace."""
    place = os.environ.get(STATE_VARIABLE)
    if place and "://" in place:
        raise UserError(f"{STATE_VARIABLE}={place}: must be a folder of this machine")
    return Path(place) if place else origin / ".cm" / "states"


@contextmanager
def hold_state(origin: Path, stage: str, key: str, on_wait: Callable[[], None]) -> Iterator[Path]:
    """Yield the state folder of a stage's key, ours alone; where another process trains the same, wait for its end."""
    folder = states_folder(origin) / f"{stage}-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder).open("w") as lock:
        if not _try_lock(lock):
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield folder


def mark_finished(folder: Path, outs: Mapping[str, str]) -> None:
    """Note what the stage made, {path: DVC hash}; from now on the state waits to be dropped."""
    (folder / FINISHED_FILE).write_text(json.dumps(dict(outs)))


def drop_finished(origin: Path, is_stored: Callable[[Mapping[str, str]], bool]) -> list[Path]:
    """Remove the states whose outputs are stored, unless somebody holds them; return what was removed."""
    dropped = []
    for marker in states_folder(origin).glob(f"*/{FINISHED_FILE}"):
        folder = marker.parent
        with _lock_file(folder).open("w") as lock:
            if _try_lock(lock) and is_stored(json.loads(marker.read_text())):
                shutil.rmtree(folder)
                dropped.append(folder)
    return dropped


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")  # beside the folder: it outlives it


def _try_lock(file: object) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
