"""Atomic files of tensors, weights and training states: a reader sees a whole one or none.

safetensors and JSON: loading runs no code.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS_FILE, STATE_FILE = "tensors.safetensors", "state.json"
STATE, LOG = "step-", "log"  # in one folder: states step-<step>, and the log
HIDDEN = ".partial-"  # prefix of names that readers ignore


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write a file under, which then takes its place; an error leaves nothing."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to `path` atomically: a temporary file beside it, flushed, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(on_cpu, temporary, metadata=metadata)
        _flush(temporary)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors onto the CPU."""
    return load_file(path)


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], *, keep: int = 2) -> None:
    """Write a training state as `folder/step-<step>` and drop all but the newest `keep`.

    States are built, and removed, under a temporary name with an atomic rename: no reader sees a torn state.
    """
    final = folder / f"{STATE}{step:09d}"
    for torn in folder.glob(f"{HIDDEN}*"):  # left by a killed process
        shutil.rmtree(torn)
    temporary = folder / f"{HIDDEN}{final.name}"
    save_tensors(temporary / TENSORS_FILE, tensors)
    (temporary / STATE_FILE).write_text(json.dumps({"step": step, **values}))
    _flush(temporary / STATE_FILE)
    if final.exists():
        _drop(final)
    os.replace(temporary, final)
    for old in list_states(folder)[:-keep]:
        _drop(old)


def load_state(state: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the output of `save_state`: tensors and plain values."""
    return load_tensors(state / TENSORS_FILE), json.loads((state / STATE_FILE).read_text())


def list_states(folder: Path) -> list[Path]:
    """Return the complete training states in `folder`, oldest first."""
    return sorted(folder.glob(f"{STATE}*")) if folder.is_dir() else []


def newest_state(paths: Iterable[str]) -> str:
    """Return the newest state's name among relative paths of files; empty if there is none."""
    return max((path.partition("/")[0] for path in paths if path.startswith(STATE)), default="")


def _drop(state: Path) -> None:
    doomed = state.with_name(f"{HIDDEN}dropped-{state.name}")
    os.replace(state, doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
