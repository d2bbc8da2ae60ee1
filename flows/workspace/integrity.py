"""Whether files still hold the bytes that DVC stored: a record of hashes, and damaged objects set aside.

DVC trusts an object by its read-only mode, and a file that it checked out by the hash that the file ought to have. The
record here knows only hashes of bytes that were read; where inode, size or time of modification differ, they are read
again.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from flows.storage.digests import recorded_digest
from flows.workspace.dvc_files import FileHash, Stage, all_locked_outs, dvc_md5, read_lock
from flows.workspace.locations import cache_of

logger = logging.getLogger(__name__)
RECORD = Path(".cm/hashes.db")


def recorded_md5(shared: Path) -> FileHash:
    """Return a function that gives a file's MD5, from the record in the shared root if the file is unchanged."""
    return partial(recorded_digest, shared / RECORD, name="md5")


def set_damaged_aside(root: Path, outs: Mapping[str, str], md5: FileHash) -> bool:
    """Move damaged objects of outputs {path: hash} out of the cache of `root`, named in the log; return if any were.

    DVC then fetches them from the remote or computes them again.
    """
    cache = cache_of(root)
    damaged = cache.damaged(outs, md5)
    for file, name in damaged.items():
        logger.warning("%s: damaged in DVC's cache, moved to %s; getting it again", name, cache.set_aside(file))
    return bool(damaged)


def read_inputs(root: Path, stage: Stage, md5: FileHash) -> dict[str, str]:
    """Return {path: DVC hash} of a stage's input artifacts, from their bytes. Raises UserError if one is missing."""
    return {path: dvc_md5(root / path, md5) for path in stage.deps if path.startswith("out/")}


def damaged_inputs(root: Path, inputs: Mapping[str, str], md5: FileHash) -> list[str]:
    """Return those of {path: hash found} that DVC's lock file gives another hash; set their damaged objects aside."""
    locked = all_locked_outs(read_lock(root).values())
    damaged = {path: locked[path] for path, found in inputs.items() if locked.get(path, found) != found}
    set_damaged_aside(root, damaged, md5)
    return list(damaged)
