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
KEY_BYTES = 32  # of a key for HMAC-SHA256, at least


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


def _bucket(text: str) -> str:
    if not text.startswith("s3://"):
        raise ValueError("must be s3://bucket/prefix")
    return text


def _key(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or not path.is_file() or path.stat().st_size < KEY_BYTES:
        raise ValueError(f"must be the absolute path of a file of {KEY_BYTES} bytes or more, from `openssl rand`")
    return path


def _places(text: str) -> tuple[str, ...]:
    places = tuple(filter(None, (one.strip() for one in text.split(","))))
    for one in places:
        if not one.startswith(("/", "s3://", "http://", "https://")):
            raise ValueError(f"{one!r}: must be a folder /..., s3://bucket/prefix or https://host, separated by commas")
    return places


def _log(text: str) -> str:
    if text not in ("text", "json"):
        raise ValueError("must be text or json")
    return text


def _page(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError("must be https://host/path")
    return text.rstrip("/")


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
    shard: bool = _variable(False, _switch, "1: shard weights and optimizer states over the processes.")
    state: str | None = _variable(None, _state, "Training states in flight: folder or s3://; default .cm/states.")
    kernels: str | None = _variable(None, _bucket, "Compiled kernels that workers share, s3://; default: none shared.")
    kernels_key: Path | None = _variable(None, _key, "File with the secret that signs them, 32 random bytes.")
    grace: int | None = _variable(None, _count_of("seconds"), "Seconds for a stopped training to save; default 10.")
    allowed_sources: tuple[str, ...] = _variable(
        (), _places, "What recipes from a server may read besides public hosts."
    )
    champion_metric: str = _variable("nfe_1/fid", str, "nfe_N/METRIC by which the champion of the registry is chosen.")
    log: str = _variable("text", _log, "json: log lines as JSON objects with run and stage.")
    notify: str | None = _variable(None, str, "Address of apprise that `cm run` tells when it ends; `--notify`.")
    keep_runs: int | None = _variable(None, _count_of("days"), "Days after which Prefect forgets runs; default never.")
    disk_low: int | None = _variable(None, _count_of("GiB"), "GiB; less free space is reported; default 10.")
    metrics_password: str | None = _variable(
        None, str, "What the metrics ask for, with the user cm; default: as the Prefect server."
    )
    user: str | None = _variable(None, str, "Who starts runs here; default: the login at MLflow, else the account.")
    mlflow_url: str | None = _variable(None, _page, "Address of MLflow's pages in links; default MLFLOW_TRACKING_URI.")
    profile: Path | None = _variable(None, Path, "Folder for profiles of trainings; `--profile` sets it.")
    home: Path | None = _variable(None, Path, "Workspace that this clone was made from.", internal=True)
    progress_file: Path | None = _variable(None, Path, "File for a stage's progress.", internal=True)
    from_server: str | None = _variable(None, str, "Set: the recipe in force came from a server.", internal=True)
    lifeline: str | None = _variable(None, str, "Set: a stage ends when its standard input closes.", internal=True)
    parent_run_id: str | None = _variable(None, str, "MLflow run that a stage's run belongs to.", internal=True)
    records: str | None = _variable(None, str, "Where the MLflow of `cm up` keeps its records.", internal=True)
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
