"""Where a workspace lies, and where the things that all its runs share are: the database, the DVC cache, the remote."""

from pathlib import Path

from flows.errors import UserError
from flows.settings import Settings
from flows.workspace.dvc_files import STAGES_FILE, Cache


def workspace_root(start: Path | None = None) -> Path:
    """Return the workspace that the current (or another) folder lies in. Raises UserError where there is none."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / STAGES_FILE).is_file() and (folder / "params").is_dir():
            return folder
    raise UserError(f"{start}: not inside a workspace (no folder above holds {STAGES_FILE} and params/)")


def shared_root(root: Path) -> Path:
    """Return where the things that all runs share are: mlflow.db, .cm/. A clone's are in the workspace it came from."""
    return (Settings.read().home or root).resolve()


def cache_of(root: Path) -> Cache:
    """Return the DVC cache of a workspace, wherever its configuration puts it."""
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
    """Return the address of DVC's default remote, unless it lies in the workspace, where nobody else looks."""
    url = remote_address(root)
    return None if url is None or ("://" not in url and Path(url).is_relative_to(shared_root(root))) else url
