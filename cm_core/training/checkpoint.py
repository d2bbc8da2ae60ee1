"""Atomic checkpoints of trainings in flight: a reader sees a whole one or none; tensors and JSON."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from cm_core.tensor_files import flush, load_tensors, save_tensors

TENSORS_FILE, STATE_FILE = "tensors.safetensors", "state.json"
STATE, LOG = "step-", "log"  # in one folder: states step-<step>, and the log
HIDDEN = ".partial-"  # prefix of names that readers ignore


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], *, keep: int = 2) -> Path:
    """Write a training state as `folder/step-<step>` and drop all but the newest `keep`.

    States are built, and removed, under a temporary name with an atomic rename: no reader sees a torn state.
    """
    final = folder / f"{STATE}{step:09d}"
    for torn in folder.glob(f"{HIDDEN}*"):  # left by a killed process
        shutil.rmtree(torn)
    temporary = folder / f"{HIDDEN}{final.name}"
    save_tensors(temporary / TENSORS_FILE, tensors)
    (temporary / STATE_FILE).write_text(json.dumps({"step": step, **values}))
    flush(temporary / STATE_FILE)
    if final.exists():
        _drop(final)
    os.replace(temporary, final)
    for old in list_states(folder)[:-keep]:
        _drop(old)
    return final


def _drop(state: Path) -> None:
    doomed = state.with_name(f"{HIDDEN}dropped-{state.name}")
    os.replace(state, doomed)
    shutil.rmtree(doomed)


def list_states(folder: Path) -> list[Path]:
    """Return the complete training states in `folder`, oldest first."""
    return sorted(folder.glob(f"{STATE}*")) if folder.is_dir() else []


def newest_state(paths: Iterable[str]) -> str:
    """Return the newest state's name among relative paths of files; empty if there is none."""
    return max((path.partition("/")[0] for path in paths if path.startswith(STATE)), default="")


def load_state(state: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the output of `save_state`: tensors and plain values."""
    return load_tensors(state / TENSORS_FILE), json.loads((state / STATE_FILE).read_text())
