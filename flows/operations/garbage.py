"""Garbage, to which nothing refers any more: DVC objects, checkpoints, clones, incomplete uploads.

A remote may be used by others: its objects are moved to a quarantine first, from which they can be brought back.

`dvc gc` counts the references of commits. Experiments, stashes, live runs, and MLflow's runs and models (by the data
version they carry) count here as well. If any source of references cannot be reached, the search ends with an error:
never assume that an object is unused.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from flows.checkpoints import s3_store, store
from flows.errors import UserError
from flows.storage.bucket import Bucket, Entry
from flows.storage.folder import Folder, Store, open_store
from flows.tracking.database import check_database
from flows.tracking.sqlite_reads import data_versions
from flows.tracking.tracker import Tracker
from flows.workspace.clone import is_live
from flows.workspace.dvc_files import DAMAGED, LOCK_FILE, locked_outs, version
from flows.workspace.git import git
from flows.workspace.locations import cache_of, remote_address, shared_root
from flows.workspace.store_users import own_records, records, unseen_users

OBJECTS, RUNS, QUARANTINE = "files/md5/", "runs/", ".cm/quarantine/"
QUARANTINED = timedelta(days=30)  # for which an object of a remote can be brought back
ORPHANED = timedelta(days=30)  # without a heartbeat: no worker will resume this training


@dataclass(frozen=True)
class Garbage:
    """An object that may be removed."""

    kind: str
    what: str
    size: int  # bytes
    remove: Callable[[], object]


def find_garbage(root: Path, *, older_than: timedelta, with_remote: bool) -> Iterator[Garbage]:
    """Yield all objects older than `older_than` to which neither git, DVC, MLflow nor a live run refers.

    Raises UserError if one of them, or a store, cannot be reached, or where others use cache or remote whose references
    cannot be seen from here.
    """
    before = datetime.now(UTC) - older_than
    cache, remote = Folder(cache_of(root).folder), _remote(root)
    _refuse_unseen(str(cache.root), cache, root)
    if with_remote and remote:
        _refuse_unseen(str(remote_address(root)), remote, root)
    needed = close_under_listings(referenced(root, cache), [cache, remote] if remote else [cache])
    yield from unneeded_objects("cache", cache, needed, before)
    for entry in cache.entries(f"{DAMAGED}/"):
        if entry.modified < before:
            yield Garbage("damaged", entry.key, entry.size, partial(cache.remove, [entry.key]))
    if with_remote and remote:
        yield from unneeded_objects("remote", remote, needed, before)
        yield from _quarantined(remote, needed)
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
            key = object_key(md5)
            places = ((store, place) for store in stores for place in (key, QUARANTINE + key))
            listing = next((found for store, place in places if (found := store.contents(place))), b"[]")
            closed |= {entry["md5"] for entry in json.loads(listing)}
    return closed


def unneeded_objects(kind: str, store: Store, needed: set[str], before: datetime) -> Iterator[Garbage]:
    """Yield a store's old unneeded objects and the run-cache entries with such outputs."""
    gone = set()

    def garbage(entry: Entry) -> Garbage:
        drop = partial(store.move, entry.key, QUARANTINE + entry.key)
        return Garbage(kind, entry.key, entry.size, drop if kind == "remote" else partial(store.remove, [entry.key]))

    for entry in store.entries(OBJECTS):
        md5 = entry.key.removeprefix(OBJECTS).replace("/", "")
        if md5 not in needed and entry.modified < before:
            gone.add(md5)
            yield garbage(entry)
    for entry in store.entries(RUNS):
        if gone & set(locked_outs(_load(store.contents(entry.key))).values()):
            yield garbage(entry)


def _quarantined(store: Store, needed: set[str]) -> Iterator[Garbage]:
    """Yield what lies in quarantine: needed objects, which go back, and those whose time is over."""
    before = datetime.now(UTC) - QUARANTINED
    for entry in store.entries(QUARANTINE):
        key = entry.key.removeprefix(QUARANTINE)
        if key.removeprefix(OBJECTS).replace("/", "") in needed:
            yield Garbage("brought back", key, entry.size, partial(store.move, entry.key, key))
        elif entry.modified < before:
            yield Garbage("quarantine", key, entry.size, partial(store.remove, [entry.key]))


def bring_back(root: Path) -> int:
    """Move everything in the remote's quarantine back to its place; return the number of objects."""
    remote = _remote(root)
    found = list(remote.entries(QUARANTINE)) if remote else []
    for entry in found:
        assert remote is not None
        remote.move(entry.key, entry.key.removeprefix(QUARANTINE))
    return len(found)


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


def _refuse_unseen(place: str, store: Store, root: Path) -> None:
    if others := unseen_users(store, shared_root(root)):
        raise UserError(
            f"{place} is used by others, whose references cannot be seen from here: {'; '.join(others)}; nothing is "
            "removed. Run it with their MLflow and repository, or remove the file named if they use the place no more"
        )


def _tracked_versions(root: Path) -> set[str]:
    """Return the data versions on runs and models, registered ones included, of the workspace's MLflow and another."""
    shared, found = shared_root(root), set[str]()
    if (file := shared / "mlflow.db").exists():
        check_database(f"sqlite:///{file}")  # of another MLflow's tables, only half may be found
        found |= data_versions(file)
    return found if records(shared) == own_records(shared) else found | Tracker(shared).data_versions()


def _remote(root: Path) -> Store | None:
    address = remote_address(root)
    found = open_store(address) if address else None
    if address and not found:
        raise UserError(f"{address}: cm gc knows remotes that are a folder or s3://")
    return found


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
