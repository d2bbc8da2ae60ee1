"""Data under data/ that DVC versions: `data/NAME.zip` beside `data/NAME.zip.dvc`, which git tracks.

A recipe names such a file by its path in the workspace and its version, valid in every clone.
"""

import logging
from pathlib import Path

from flows.errors import UserError
from flows.workspace.dvc_files import dvc, dvc_md5, load_yaml
from flows.workspace.integrity import recorded_md5, set_damaged_aside
from flows.workspace.locations import shared_root

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

    Raises UserError if the recipe asks for another version than the workspace points to, the file cannot be fetched, or
    its bytes are of no version.
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
    md5 = recorded_md5(shared_root(root))
    if not (root / path).exists():
        set_damaged_aside(root, {path: found}, md5)
        dvc(root, "pull", f"{path}.dvc")
    if (read := dvc_md5(root / path, md5)) != found:
        raise UserError(
            f"{root / path}: not the bytes of version {found}, they have the hash {read}; `dvc checkout --force "
            f"{path}.dvc` restores them, `cm data add` makes them a version"
        )
    logger.info("prepare: %s, version %s", path, found)
    return {path: found}


def add_versioned(root: Path, path: Path, description: str, facts: dict) -> str:
    """Add a file of the workspace to DVC, with a description, and return its version."""
    from dvc.utils.serialize import modify_yaml

    dvc(root, "add", str(path))
    with modify_yaml(str(root / f"{path}.dvc")) as entry:
        entry["desc"], entry["meta"] = description, facts
    return version_of(load_yaml(root / f"{path}.dvc"))
