"""Garbage, to which nothing refers any more: DVC objects, checkpoints, clones, incomplete uploads.

`dvc gc` counts the references of commits. Experiments, stashes, live runs, and MLflow's runs and models (by the data
version they carry) count here as well. If any source of references cannot be reached, the search ends with an error:
never assume that an object is unused.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from flows.checkpoints import s3_store, store
from flows.errors import UserError
from flows.storage.bucket import Bucket, Entry
from flows.tracking.tracker import Tracker
from flows.workspace.clone import is_live
from flows.workspace.dvc_files import LOCK_FILE, locked_outs, version
from flows.workspace.git import git
from flows.workspace.locations import cache_of, remote_address, shared_root

OBJECTS, RUNS = "files/md5/", "runs/"
ORPHANED = timedelta(days=30)  # without a heartbeat: no worker will resume this training


@dataclass(frozen=True)
class Garbage:
    """An object that may be removed."""

    kind: str
    what: str
    size: int  # bytes
    remove: Callable[[], object]


class Folder:
    """A DVC cache or remote that is a folder; a Bucket is the other kind of store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entries(self, folder: str = "") -> Iterator[Entry]:
        """Yield the files below `folder`."""
        for path in (self.root / folder).rglob("*"):
            if path.is_file():
                facts = path.stat()
                modified = datetime.fromtimestamp(facts.st_mtime, UTC)
                yield Entry(path.relative_to(self.root).as_posix(), facts.st_size, modified)

    def contents(self, key: str) -> bytes | None:
        """Return a file's contents, or None if there is no such file."""
        path = self.root / key
        return path.read_bytes() if path.is_file() else None

    def remove(self, keys: Iterable[str]) -> None:
        """Delete files."""
        for key in keys:
            (self.root / key).unlink(missing_ok=True)


Store = Folder | Bucket


def find_garbage(root: Path, *, older_than: timedelta, with_remote: bool) -> Iterator[Garbage]:
    """Yield all objects older than `older_than` to which neither git, DVC, MLflow nor a live run refers.

    Raises UserError if one of them, or a store, cannot be reached.
    """
    before = datetime.now(UTC) - older_than
    cache, remote = Folder(cache_of(root).folder), _remote(root)
    needed = close_under_listings(referenced(root, cache), [cache, remote] if remote else [cache])
    yield from unneeded_objects("cache", cache, needed, before)
    if with_remote and remote:
        yield from unneeded_objects("remote", remote, needed, before)
        yield from _torn_uploads(remote, before)
    yield from _states(shared_root(root), min(before, datetime.now(UTC) - ORPHANED))
    if bucket := store.states_bucket():
        yield from _bucket_states(bucket, older_than=max(older_than, ORPHANED))
        yield from _torn_uploads(bucket, before)
    yield from _clones(root, before)


def referenced(root: Path, cache: Folder) -> set[str]:
    """Return the referenced DVC hashes; the hash of a folder stands for its files as well."""
    needed = {md5 for text in _committed(root) for md5 in hashes(text)}
    for workspace in (root, *(run / "workspace" for run in _runs(root) if is_live(run))):
        for path in (workspace / LOCK_FILE, *workspace.glob("*.dvc"), *workspace.glob("data/**/*.dvc")):
            needed |= set(hashes(path.read_text())) if path.is_file() else set()
    versions = _tracked_versions(root)
    for entry in cache.entries(RUNS):
        stage = _load(cache.contents(entry.key))
        outs = locked_outs(stage)
        if versions & {version(outs), *outs.values()}:
            needed |= {*outs.values(), *(dep["md5"] for dep in stage.get("deps", ()) if "md5" in dep)}
    return needed | versions


def close_under_listings(needed: set[str], stores: list[Store]) -> set[str]:
    """Add the files of every folder in `needed`, read from its listing in the first store that has it."""
    closed = set(needed)
    for md5 in needed:
        if md5.endswith(".dir"):
            listing = next((found for store in stores if (found := store.contents(object_key(md5)))), b"[]")
            closed |= {entry["md5"] for entry in json.loads(listing)}
    return closed


def unneeded_objects(kind: str, store: Store, needed: set[str], before: datetime) -> Iterator[Garbage]:
    """Yield a store's old unneeded objects and the run-cache entries with such outputs."""
    gone = set()
    for entry in store.entries(OBJECTS):
        md5 = entry.key.removeprefix(OBJECTS).replace("/", "")
        if md5 not in needed and entry.modified < before:
            gone.add(md5)
            yield Garbage(kind, entry.key, entry.size, partial(store.remove, [entry.key]))
    for entry in store.entries(RUNS):
        if gone & set(locked_outs(_load(store.contents(entry.key))).values()):
            yield Garbage(kind, entry.key, entry.size, partial(store.remove, [entry.key]))


def object_key(md5: str) -> str:
    """Return the path of an object in a DVC store."""
    return f"{OBJECTS}{md5[:2]}/{md5[2:]}"


def _load(text: bytes | str | None) -> Any:
    import yaml

    assert text is not None, "it was listed"
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def hashes(text: str) -> Iterator[str]:
    """Yield the DVC hashes in a dvc.lock or a .dvc file."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["md5"]] if isinstance(node.get("md5"), str) else ()
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from walk(child)

    yield from walk(_load(text))


def _committed(root: Path) -> Iterator[str]:
    """Yield every dvc.lock and .dvc file at the tips of branches, tags, experiments, stashes, and at HEAD."""
    revisions = {"HEAD", *_git(root, "for-each-ref", "--format=%(objectname)").split()}
    if (root / ".git/refs/stash").exists():
        revisions |= {*_git(root, "log", "-g", "--format=%H", "refs/stash").split()}
    blobs = set()
    for revision in revisions:
        for line in _git(root, "ls-tree", "-r", "-z", f"{revision}^{{tree}}").split("\0"):
            facts, _, path = line.partition("\t")
            if path == LOCK_FILE or path.endswith(".dvc"):
                blobs.add(facts.split()[2])
    yield from (_git(root, "cat-file", "blob", blob) for blob in blobs)


def _git(root: Path, *arguments: str) -> str:
    return git(root, *arguments).decode()


def _tracked_versions(root: Path) -> set[str]:
    """Return the data versions on MLflow's runs and models, registered ones included."""
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (shared_root(root) / "mlflow.db").exists():
        return set()
    return Tracker(shared_root(root)).data_versions()


def _remote(root: Path) -> Store | None:
    url = remote_address(root)
    if url is None:
        return None
    if "://" in url and not url.startswith("s3://"):
        raise UserError(f"{url}: cm gc knows remotes that are a folder or s3://")
    return Bucket(url) if "://" in url else Folder(Path(url))


def _states(shared: Path, before: datetime) -> Iterator[Garbage]:
    for folder in sorted(store.states_folder(shared).glob("*/")):
        files = list(Folder(folder).entries())
        newest = max((entry.modified for entry in files), default=datetime.min.replace(tzinfo=UTC))
        if newest < before:
            size = sum(entry.size for entry in files)
            yield Garbage("state", str(folder), size, partial(store.drop_unheld, folder))


def _bucket_states(bucket: Bucket, *, older_than: timedelta) -> Iterator[Garbage]:
    sizes: dict[str, int] = {}
    for entry in bucket.entries():
        name = entry.key.partition("/")[0]
        sizes[name] = sizes.get(name, 0) + entry.size
    for name, size in sizes.items():
        place = bucket.below(name)
        if s3_store.is_orphan(place, older_than.total_seconds()):
            yield Garbage("state", place.uri, size, partial(s3_store.remove_training, place))


def _torn_uploads(store: Store, before: datetime) -> Iterator[Garbage]:
    if not isinstance(store, Bucket):
        return
    for key, upload_id, started in store.open_uploads():
        if started < before:
            yield Garbage("torn upload", f"{store.uri}/{key}", 0, partial(store.abort_upload, key, upload_id))


def _runs(root: Path) -> list[Path]:
    runs = shared_root(root) / ".cm" / "runs"
    return sorted(run for run in runs.iterdir() if run.is_dir()) if runs.is_dir() else []


def _clones(root: Path, before: datetime) -> Iterator[Garbage]:
    for run in _runs(root):
        if not is_live(run) and datetime.fromtimestamp(run.stat().st_mtime, UTC) < before:
            size = sum(entry.size for entry in Folder(run).entries())
            yield Garbage("clone", str(run), size, partial(shutil.rmtree, run))
