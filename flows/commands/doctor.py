"""`cm doctor`: check packages, services, stores and the training device."""

import os
import platform
import shutil
import sys
import tempfile
import urllib.request
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.output import add_json_option, print_json, print_table
from flows.commands.runs import tracker_of
from flows.operations.checks import BEFORE_A_RUN
from flows.storage.s3 import public_text, public_uri
from flows.workspace.git import git, revision
from flows.workspace.locations import shared_root, workspace_root

if TYPE_CHECKING:
    from flows.storage.bucket import Bucket

PROJECT, SHOWN = "consistency-pipeline", ("prefect", "mlflow", "dvc")
FREE_GB = 2  # for a demo with its clones and cache
REMEDY = "use another store for CM_STATE"
PROBE, SECONDS = b"written by cm doctor", 10


class Broken(Exception):
    """A failed check: the finding and the remedy."""


def add_parsers(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("doctor", help="check packages, services, stores and the device")
    parser.add_argument("--verify", action="store_true", help="read all of DVC's cache and set damaged objects aside")
    add_json_option(parser)
    parser.set_defaults(command=doctor)


def doctor(args: Namespace) -> int:
    """Print every check; return 1 if something is broken."""
    checks = [_examine(name, probe) for name, probe in MACHINE.items()]
    if checks[-1]["ok"]:
        deep = {"DVC cache, every byte": _verify_cache} if args.verify else {}
        checks += [_examine(name, probe) for name, probe in (WORKSPACE | deep).items()]
    sound = all(check["ok"] for check in checks)
    if args.json:
        print_json({"ok": sound, "checks": checks})
    else:
        print_table(("", "check", "found"), [("ok" if c["ok"] else "BROKEN", c["name"], c["says"]) for c in checks])
    return 0 if sound else 1


def _examine(name: str, probe: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "says": probe()}
    except Exception as error:  # any failure of a part is the answer
        said = public_text(" ".join(str(error).split()))
        return {"name": name, "ok": False, "says": said or type(error).__name__}


def _packages() -> str:
    """Compare required with installed versions: `import prefect` does not report an incompatible fastapi."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires(PROJECT) or ()]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in wanted:
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            raise Broken(f"{one.name} is not installed; `make install`") from None
        if not one.specifier.contains(version, prereleases=True):
            raise Broken(f"{one.name} {version} is installed, {one.specifier} is needed; `make install`")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in SHOWN)
    return f"{shown}; all {len(wanted)} requirements are met"


def _torch() -> str:
    import torch

    from flows.distributed.devices import refuse_unusable_gpus

    refuse_unusable_gpus()
    if not torch.cuda.is_available():
        return f"{torch.__version__} on the CPU, {torch.get_num_threads()} threads"
    free, total = (f"{number / 2**30:.0f}" for number in torch.cuda.mem_get_info())
    return f"{torch.__version__} on {torch.cuda.get_device_name()}, {free} of {total} GiB free"


def _torchvision() -> str:
    from cm_core.metrics.torchvision_shim import ensure_torchvision

    declared = ensure_torchvision()
    version = metadata.version("torchvision")
    return f"{version}, without its compiled operators (none is needed)" if declared else version


def _git() -> str:
    version = git(workspace_root(), "--version").decode().strip().removeprefix("git version ")
    return f"{version}, workspace at {revision(workspace_root())[:7]}"


def _writable(folder: Path) -> Path:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(PROBE)
    return folder


def _disk() -> str:
    free = shutil.disk_usage(workspace_root()).free / 1e9
    if free < FREE_GB:
        raise Broken(f"{free:.1f} GB are free, {FREE_GB} GB are needed; old runs are in .cm/runs; `cm gc`")
    return f"{free:.0f} GB free"


def _mlflow() -> str:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    if (tracker := tracker_of(workspace_root())) is None:
        return f"sqlite:///{shared_root(workspace_root()) / 'mlflow.db'}, created by the first run"
    tracker.client.search_runs([tracker.experiment_id], max_results=1)
    return f"{public_uri(tracker.uri)}, answers"


def _prefect() -> str:
    from prefect.settings import PREFECT_API_URL

    url = os.environ.get(PREFECT_API_URL.name) or PREFECT_API_URL.value()  # of the profile; Prefect read them once
    if not url:
        return "embedded: every run brings its own"
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=SECONDS):
            return f"{public_uri(url)}, answers"
    except (OSError, ValueError) as error:
        raise Broken(f"PREFECT_API_URL={url}: {error}; start it with `prefect server start`, or unset it") from error


def _dvc_cache() -> str:
    from dvc.repo import Repo

    with Repo(str(workspace_root())) as repo:
        return f"{_write_read_remove(repo.cache.local)}; `cm gc` frees space (`dvc gc` drops flows' results)"


def _verify_cache() -> str:
    """Read every object, also those on record as sound: a failing disk leaves size and time as they were."""
    from flows.stage_runner.progress import Bar
    from flows.workspace.dvc_files import file_md5, is_damaged
    from flows.workspace.locations import cache_of

    cache = cache_of(workspace_root())
    objects, damaged, size = cache.objects(), [], 0
    total = sum(file.stat().st_size for file in objects)
    with ThreadPoolExecutor() as pool, Bar("DVC cache") as bar:
        for file, bad in zip(objects, pool.map(partial(is_damaged, md5=file_md5), objects), strict=True):
            size += file.stat().st_size
            damaged += [cache.set_aside(file)] if bad else []
            bar.progress(size, total, "bytes")
    if damaged:
        names = ", ".join(str(file) for file in damaged)
        raise Broken(
            f"{len(damaged)} of {len(objects)} objects were damaged, and are fetched or computed again: {names}"
        )
    return f"{len(objects)} objects, {size / 1e9:.1f} GB, every byte as stored"


def _dvc_remote() -> str:
    from dvc.config import NoRemoteError
    from dvc.repo import Repo

    with Repo(str(workspace_root())) as repo:
        try:
            return _write_read_remove(repo.cloud.get_remote_odb(command="push"))
        except NoRemoteError:
            return "none is configured; results stay on this machine"


def _write_read_remove(store: Any) -> str:
    """Access one of DVC's folders or buckets as DVC does."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(PROBE)
        file.flush()
        store.fs.makedirs(store.path, exist_ok=True)
        path = store.fs.join(store.path, f"cm-doctor-{os.getpid()}")
        store.fs.put_file(file.name, path)
    read = store.fs.cat_file(path)
    store.fs.rm_file(path)  # `rm` deletes by lists, for which old stores want another checksum
    return _proved(store.fs.unstrip_protocol(store.path), read)


def _proved(place: str, read: bytes) -> str:
    if read != PROBE:
        raise Broken(f"{place}: the bytes read differ from those written")
    return f"{place}, written, read and removed"


def _states() -> str:
    from flows.checkpoints.store import states_bucket, states_folder

    bucket = states_bucket()
    if bucket is None:
        folder = states_folder(shared_root(workspace_root()))
        folder.mkdir(parents=True, exist_ok=True)
        return f"{_writable(folder)}, writable; no other machine reaches it"
    return _prove_leases(bucket)


def _prove_leases(bucket: "Bucket") -> str:
    """Write, read and remove an object; check that the store keeps the conditions on which leases depend."""
    key = f"cm-doctor-{os.getpid()}"
    stale = bucket.write(key, b"a former version", replacing=None)
    try:
        etag = bucket.write(key, PROBE, replacing=stale or "")
        if bucket.write(key, b"", replacing=None) is not None:
            raise Broken(f"{bucket.uri}: the store ignores If-None-Match, two workers could train the same; {REMEDY}")
        if bucket.write(key, b"", replacing=stale or "") is not None:
            raise Broken(f"{bucket.uri}: the store ignores If-Match, a late worker could overwrite another; {REMEDY}")
        if etag is None or bucket.contents(key) != PROBE:
            raise Broken(f"{bucket.uri}: the bytes read differ from those written")
        if bucket.remove_version(key, stale or "") or bucket.read(key) is None:
            raise Broken(f"{bucket.uri}: the store ignores If-Match of DELETE, a late worker could delete; {REMEDY}")
    finally:
        bucket.remove([key])
    if bucket.read(key) is not None:
        raise Broken(f"{bucket.uri}: the object that was removed is still there")
    return f"{bucket.uri}, written, read and removed; a second writer and a late one were refused"


def _artifacts() -> str:
    """Access MLflow's artifact store as MLflow does."""
    if (tracker := tracker_of(workspace_root())) is None:
        return f"{shared_root(workspace_root()) / 'mlruns'}, created by the first run"
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    place, name = tracker.client.get_experiment(tracker.experiment_id).artifact_location, f"cm-doctor-{os.getpid()}"
    store = get_artifact_repository(place, tracking_uri=tracker.uri)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(PROBE)
        store.log_artifact(str(Path(folder) / name), "cm-doctor")
        (Path(folder) / name).unlink()
        read = Path(store.download_artifacts(f"cm-doctor/{name}", folder)).read_bytes()
    if place.startswith("s3://"):  # MLflow deletes by lists, for which old stores want another checksum
        from flows.storage.bucket import Bucket

        Bucket(place).remove([f"cm-doctor/{name}"])
    else:
        store.delete_artifacts(f"cm-doctor/{name}")
    return _proved(place, read)


def _prefect_results() -> str:
    """Check the block in which Prefect keeps results, if one is configured."""
    from prefect.blocks.core import Block
    from prefect.settings import PREFECT_DEFAULT_RESULT_STORAGE_BLOCK

    slug = PREFECT_DEFAULT_RESULT_STORAGE_BLOCK.value()
    if not slug:
        return "in Prefect's own folder of each machine"
    block: Any = Block.load(slug)
    name = f"cm-doctor-{os.getpid()}"
    place = block.write_path(name, PROBE)
    read = block.read_path(name)
    if hasattr(block, "filesystem"):
        block.filesystem.rm(place)
    else:
        Path(place).unlink()
    return _proved(f"{slug} at {block.basepath}", read)


def _data() -> str:
    """Check the images of the recipe in force."""
    from flows.data.check import check_latents, check_source
    from flows.recipes.recipe import load_active

    data = load_active(workspace_root()).data
    check_latents(data.latents, workspace_root())
    return check_source(data.source, workspace_root())


def _formats() -> str:
    from flows.data.check import check_formats

    return check_formats()


MACHINE: dict[str, Callable[[], str]] = {
    "python": lambda: f"{platform.python_version()} ({sys.executable})",
    "packages": _packages,
    "torch": _torch,
    "torchvision": _torchvision,
    "image formats": _formats,
    **BEFORE_A_RUN,
    "Prefect": _prefect,
    "workspace": lambda: f"{_writable(workspace_root())}, writable",  # last: the remaining checks need one
}
WORKSPACE: dict[str, Callable[[], str]] = {
    "git": _git,
    "disk": _disk,
    "data": _data,
    "MLflow": _mlflow,
    "DVC cache": _dvc_cache,
    "DVC remote": _dvc_remote,
    "MLflow artifacts": _artifacts,
    "Prefect results": _prefect_results,
    "training states": _states,
}
