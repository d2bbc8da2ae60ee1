"""The environment variables CM_*: facts of a machine or a run that are no part of a recipe.

Only this module reads and checks them; docs/settings.md lists them.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flows.errors import UserError

PREFIX = "CM_"


def _count_of(things: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) > 0):
            raise ValueError(f"must be a number of {things}, 1 or more")
        return int(text)

    return read


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 1, to shard weights over processes, or 0")
    return text == "1"


def _state(text: str) -> str:
    if "://" in text and not text.startswith("s3://"):
        raise ValueError("must be a folder of this machine or s3://bucket/prefix")
    return text


def _tags(text: str) -> dict[str, str]:
    tags = json.loads(text)  # a JSONDecodeError is a ValueError
    if not isinstance(tags, dict):
        raise ValueError("must be a JSON object")
    return tags


def _variable(default: Any, read: Callable[[str], Any], doc: str, *, internal: bool = False) -> Any:
    return field(default=default, metadata={"read": read, "doc": doc, "internal": internal})


@dataclass(frozen=True)
class Settings:
    """The variables by name without CM_; unset or empty means the default."""

    devices: int = _variable(1, _count_of("devices"), "GPUs of each machine for a training or sampling.")
    shard: bool = _variable(False, _switch, "1: divide weights and optimizer states among the processes.")
    state: str | None = _variable(None, _state, "Training states in flight: folder or s3://; default .cm/states.")
    kernels: str | None = _variable(None, str, "Compiled kernels, s3://; default compiled/ below CM_STATE if a bucket.")
    champion_metric: str = _variable("fid/nfe_1", str, "METRIC/nfe_N by which the champion of the registry is chosen.")
    profile: Path | None = _variable(None, Path, "Folder for profiles of trainings; `--profile` sets it.")
    home: Path | None = _variable(None, Path, "Workspace that this clone was made from.", internal=True)
    progress_file: Path | None = _variable(None, Path, "File for a stage's progress.", internal=True)
    lifeline: str | None = _variable(None, str, "Set: a stage ends when its standard input closes.", internal=True)
    parent_run_id: str | None = _variable(None, str, "MLflow run that a stage's run belongs to.", internal=True)
    run_tags: dict[str, str] | None = _variable(None, _tags, "JSON object of tags for that run.", internal=True)

    @classmethod
    def read(cls) -> "Settings":
        """Read the current environment. Raises UserError naming variable, value and what is allowed."""
        values = {}
        for one in fields(cls):
            name = variable(one.name)
            if text := os.environ.get(name):
                try:
                    values[one.name] = one.metadata["read"](text)
                except ValueError as error:
                    raise UserError(f"{name}={text}: {error}") from None
        return cls(**values)


def variable(name: str) -> str:
    """Return the environment variable of a field."""
    return PREFIX + name.upper()
