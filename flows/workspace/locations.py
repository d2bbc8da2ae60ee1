"""The root of a workspace, and the locations that its runs share: database, DVC cache, remote."""

import os
import re
from pathlib import Path

from flows.errors import UserError
from flows.settings import Settings
from flows.workspace.dvc_files import STAGES_FILE, Cache

# An address of SQLite ends at "?", PYTHONPATH and PATH divide at ":", DVC and Prefect fill in "%(" and "{{"; what is
# not UTF-8, and control characters, stand in no configuration file.
UNWRITABLE = re.compile(r"[?:\x00-\x1f\x7f\ud800-\udfff]|%\(|\{\{")


def workspace_root(start: Path | None = None) -> Path:
    """Return the workspace that contains the current (or another) folder.

    Raises UserError if there is none, or its path cannot be written in an address.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / STAGES_FILE).is_file() and (folder / "params").is_dir():
            if found := UNWRITABLE.search(str(folder)):
                raise UserError(f"{folder}: {found[0]!r} in the path of a workspace; rename the folder")
            return folder
    raise UserError(f"{start}: not inside a workspace (no folder above holds {STAGES_FILE} and params/)")


def shared_root(root: Path) -> Path:
    """Return the root of shared data (mlflow.db, .cm/): for a clone, the workspace it came from.

    DVC names it to the stages of an experiment, which `dvc exp run --temp` and `--queue` run in a folder of their own.
    """
    return Path(Settings.read().home or os.environ.get("DVC_ROOT") or root).resolve()


def cache_of(root: Path) -> Cache:
    """Return the DVC cache of a workspace as configured."""
    from dvc.config import Config

    folder = Config(str(root / ".dvc")).get("cache", {}).get("dir")
    return Cache(Path(folder or root / ".dvc" / "cache"))


def remote_address(root: Path) -> str | None:
    """Return the address of DVC's default remote, if there is one."""
    from dvc.config import Config

    config = Config(str(root / ".dvc"))
    name = config["core"].get("remote")
    return str(config["remote"][name]["url"]) if name else None


def shared_remote(root: Path) -> str | None:
    """Return the address of DVC's default remote, unless it lies in the workspace, where no other machine reads it."""
    url = remote_address(root)
    return None if url is None or ("://" not in url and Path(url).is_relative_to(shared_root(root))) else url
