"""Data under data/ that DVC versions: `data/NAME.zip` beside `data/NAME.zip.dvc`, which git tracks.

A recipe names such a file by its path in the workspace and its version, valid in every clone.
"""

import logging
import subprocess
from pathlib import Path

from flows.errors import UserError
from flows.workspace.dvc_files import DVC, load_yaml

logger = logging.getLogger(__name__)
FOLDER = Path("data")


def versions(root: Path) -> dict[Path, dict]:
    """Return the versioned files of the workspace, relative to it: {path: its .dvc file's entry}."""
    return {
        pointer.relative_to(root).with_suffix(""): load_yaml(pointer)
        for pointer in sorted((root / FOLDER).glob("*.dvc"))
    }


def version_of(entry: dict) -> str:
    """Return the version that a .dvc file's entry points to."""
    return entry["outs"][0]["md5"]


def fetch_versioned(root: Path, path: str, version: str) -> dict[str, str]:
    """Provide the file at `path` from the cache or a remote if DVC versions it; return {path: version} of it.

    Raises UserError if the recipe asks for another version than the workspace points to, or the file cannot be fetched.
    """
    entry = versions(root).get(Path(path))
    if entry is None:
        return {}
    found = version_of(entry)
    if version != found:
        raise UserError(
            f"{path}: the workspace is at version {found}, data.source.version={version!r}; "
            f"set it to {found}, or bring {path}.dvc to the other version with git"
        )
    if not (root / path).exists():
        _dvc(root, "pull", f"{path}.dvc")
    logger.info("prepare: %s, version %s", path, found)
    return {path: found}


def add_versioned(root: Path, path: Path, description: str, facts: dict) -> str:
    """Add a file of the workspace to DVC, with a description, and return its version."""
    from dvc.utils.serialize import modify_yaml

    _dvc(root, "add", str(path))
    with modify_yaml(str(root / f"{path}.dvc")) as entry:
        entry["desc"], entry["meta"] = description, facts
    return version_of(load_yaml(root / f"{path}.dvc"))


def push_versioned(root: Path, path: Path) -> None:
    """Push a versioned file to DVC's remote."""
    _dvc(root, "push", f"{path}.dvc")


def _dvc(root: Path, *arguments: str) -> None:
    done = subprocess.run(
        [*DVC, *arguments], cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{root}: dvc {' '.join(arguments)} failed: {' '.join(done.stderr.split())}")
