"""Checks of what would make a run fail, before it begins; `cm doctor` shows each in a line."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from flows import environment
from flows.distributed.devices import visible_devices
from flows.errors import UserError
from flows.storage.s3 import public_uri
from flows.workspace.dvc_files import check_user_settings


def check_before_a_run() -> None:
    """Raise UserError for the first check that fails."""
    for check in BEFORE_A_RUN.values():
        check()


def _check_devices() -> str:
    return f"{len(visible_devices())} GPUs"


def _check_prefect_settings() -> str:
    """Read Prefect's settings, from variables and the profile in force, as its import does."""
    _check_prefect_home()
    said = io.StringIO()  # its plugins complain of the same at length
    try:
        with redirect_stderr(said):
            from prefect.settings import get_current_settings

            settings = get_current_settings()
    except ValueError as error:  # of pydantic or of TOML's parser
        raise UserError(_name_setting(error)) from None
    print(said.getvalue().partition("Traceback")[0], end="", file=sys.stderr)
    return f"home {settings.home}, {public_uri(settings.api.url or 'no server is named')}"


def _check_prefect_home() -> None:
    """Raise UserError if the folder that PREFECT_HOME names cannot be written; without it, one of ours is used."""
    if home := os.environ.get("PREFECT_HOME"):
        try:
            Path(home).expanduser().mkdir(parents=True, exist_ok=True)
            environment.take_space(Path(home).expanduser())
        except OSError as error:
            raise UserError(f"PREFECT_HOME={home}: cannot be written ({error.strerror})") from None


def _name_setting(error: Any) -> str:
    """Return which variable, or else which file, holds the value that Prefect could not read."""
    if not hasattr(error, "errors"):
        return f"{_profiles_file()}: {error}"
    fault = error.errors()[0]
    value = str(fault["input"]).casefold()
    names = [name for name, text in os.environ.items() if name.startswith("PREFECT_") and text.casefold() == value]
    return f"{', '.join(names) or _profiles_file()}: {fault['loc'][-1]}={fault['input']}: {fault['msg']}"


def _profiles_file() -> Path:
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    return Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")


BEFORE_A_RUN: dict[str, Callable[[], str]] = {
    **environment.CHECKS,
    "devices": _check_devices,
    "Prefect settings": _check_prefect_settings,
    "DVC settings": check_user_settings,
}
