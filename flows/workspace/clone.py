"""A flow run's own clone of the workspace, and DVC commands in it.

DVC locks a workspace per run, so each run gets a clone at a recorded revision, with the workspace's uncommitted edits
as one commit. All clones share that workspace's DVC cache and hence each other's results.
"""

import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.atomic import named_lock, try_lock
from flows.errors import DISK_FULL, USER_ERROR, RunEnding, StageFailed, UserError, printable
from flows.storage.folder import open_store
from flows.storage.s3 import public_text
from flows.workspace.dvc_files import (
    DVC,
    LOCK_FILE,
    all_locked_outs,
    dvc,
    locked_outs,
    read_lock,
    read_stages,
    stage_key,
    update_lock,
    upstream,
)
from flows.workspace.git import clone_repository, commit_edits, revision, uncommitted_patch, without_secrets
from flows.workspace.integrity import damaged_inputs, read_inputs, recorded_md5, set_damaged_aside
from flows.workspace.locations import cache_of, shared_remote, shared_root
from flows.workspace.process import Process
from flows.workspace.store_users import register_at_cache, register_user

logger = logging.getLogger(__name__)
CLONE, EDITS_FILE, LIVE_FILE, DONE_FILE = "workspace", "edits.patch", "live", "done"
LOCKS = Path(".cm/making")  # of results that some run of this machine is making
KEPT_DONE, KEPT_FAILED = 2, 5  # folders of ended runs; a failed one serves debugging
LINKS = "hardlink,symlink,copy"  # to the cache, in order of preference; of hard links DVC makes no copy to store them
MAX_NAME = 60  # characters of a run's name in its folder's name: overrides can exceed the file system's limit
DVC_EMPTY = "__init__.py' is empty."  # end of DVC's warning about an empty package file
DVC_CHATTER = (  # hints and bookkeeping unrelated to the stage
    "Generating lock file",
    "Updating lock file",
    "To track the changes with git, run:",
    "\tgit add",
    "To enable auto staging, run:",
    "\tdvc config core.autostage",
    "Use `dvc push`",
    "Data and pipelines are up to date.",
    "> cm stage",
)


@dataclass(frozen=True)
class StageResult:
    """The outcome of updating a stage."""

    cached: bool
    """Whether DVC had the outputs already, so that nothing ran."""
    entry: dict[str, Any]
    """The stage's entry in dvc.lock."""


def clone(root: Path, run_name: str) -> "Workspace":
    """Clone the workspace `root`, uncommitted edits included, for one run.

    Raises UserError if `root` is not the top of a git repository with a commit, or its edits are too large to capture.
    """
    commit = revision(root)
    folder = _make_folder(root / ".cm" / "runs", run_name)
    target = folder / CLONE
    clone_repository(root, target, commit)
    edits = uncommitted_patch(root)
    if edits:
        patch = folder / EDITS_FILE
        patch.write_bytes(edits)
        commit_edits(target, patch, run_name)
        logged, left_out = without_secrets(edits)
        patch.write_bytes(logged)
        for name, reason in left_out.items():
            logger.warning("%s: the record of the uncommitted edits lacks it: %s", name, reason)
    if (root / LOCK_FILE).exists():
        shutil.copyfile(root / LOCK_FILE, target / LOCK_FILE)
    _share_dvc(root, target)
    return Workspace(folder, shared_root(root), commit)


def _make_folder(runs: Path, run_name: str) -> Path:
    """Create the run's own folder, after removing old runs' folders."""
    runs.mkdir(parents=True, exist_ok=True)
    _clean(runs)
    return Path(tempfile.mkdtemp(prefix=f"{file_name(run_name)}-", dir=runs))


def file_name(run_name: str) -> str:
    """Return a run's name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", run_name).strip("-.")[:MAX_NAME]


def _clean(runs: Path) -> None:
    """Drop all but the newest folders of ended runs; a live run holds a lock on its folder."""
    ended = sorted((folder for folder in runs.iterdir() if not is_live(folder)), key=lambda f: -f.stat().st_mtime)
    done = [folder for folder in ended if (folder / DONE_FILE).exists()]
    failed = [folder for folder in ended if folder not in done]
    for folder in done[KEPT_DONE:] + failed[KEPT_FAILED:]:
        shutil.rmtree(folder, ignore_errors=True)  # two runs may clean concurrently


def is_live(folder: Path) -> bool:
    """Whether the run of this folder is alive."""
    try:
        with (folder / LIVE_FILE).open("a") as file:
            return not try_lock(file)
    except FileNotFoundError:  # another run is removing it at this moment
        return True


def _share_dvc(root: Path, target: Path) -> None:
    """Give the clone the DVC cache and remotes of `root` (its own relative paths would resolve elsewhere).

    Downloads from a remote are always verified: by default DVC trusts the name of damaged bytes. Files are linked to
    the cache, not copied: a stage reads its inputs, and writes into a folder that is empty when it starts.
    """
    from configobj import ConfigObj
    from dvc.config import Config

    own = Config(str(root / ".dvc")).read("local")  # its relative paths made absolute
    remotes = {**Config(str(root / ".dvc")).read("repo")["remote"], **own["remote"]}
    file = ConfigObj(encoding="utf-8", interpolation=False)  # DVC's own writer knows ASCII alone
    file.update({name: values for name, values in own.items() if name not in ("remote", "machine", "db")})
    file["cache"] = {**own["cache"], "dir": str(cache_of(root).folder), "type": LINKS}
    for name, remote in remotes.items():
        file[f'remote "{name}"'] = {**own["remote"].get(name, {}), "url": str(remote["url"]), "verify": True}
    file.filename = str(target / ".dvc" / "config.local")
    file.write()


class Workspace:
    """The clone of one run, a context manager that stops its remaining commands on exit."""

    def __init__(self, folder: Path, shared_root: Path, revision: str) -> None:
        self.folder, self.root, self.shared_root = folder, folder / CLONE, shared_root
        self.revision = revision
        self._live = (folder / LIVE_FILE).open("w")
        fcntl.flock(self._live, fcntl.LOCK_EX)
        self._md5 = recorded_md5(shared_root)
        self.seconds: dict[str, float] = {}  # DVC's running time by stage
        self._unpushed: list[str] = []  # stages whose push failed
        self._running: set[Process] = set()
        self.ending, self._starting = False, threading.Lock()  # ending: nothing more may start

    def __enter__(self) -> "Workspace":
        register_at_cache(self.shared_root)
        url = shared_remote(self.shared_root)
        if url and (remote := open_store(url)):
            try:
                register_user(remote, self.shared_root)
            except UserError as error:
                logger.warning("`cm gc --remote` of others will not know of this run: %s", error)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        if kind is None:
            (self.folder / DONE_FILE).touch()
        self._live.close()

    def reproduce(
        self,
        stage: str,
        *,
        slot: Callable[[], AbstractContextManager[Mapping[str, str]]] | None = None,
        variables: Mapping[str, str] | None = None,
        on_progress: Callable[[dict[str, Any]], None] = lambda progress: None,
    ) -> StageResult:
        """Update one stage through DVC, fetching missing inputs from the cache or the remote.

        Runs of one machine that need the same result make it one after the other, so that the first makes it for all.
        While it may run, `slot` is held, which yields variables of its environment, as `variables` does; inputs are
        brought and read before, results pushed after. Its output is logged, `on_progress` gets its progress. A cached
        result of which objects are damaged is fetched or computed again. Raises UserError if the stage did, StageFailed
        for any other failure, RunEnding after `stop`.
        """
        progress = _Progress(self.folder / f"progress-{stage}.json", on_progress)
        if slot:
            self._bring_inputs(stage)
        with self._turn(stage), slot() if slot else nullcontext({}) as given:
            started = time.monotonic()
            variables = {"CM_PROGRESS_FILE": str(progress.path), **(variables or {}), **given}
            command = ("repro", "--single-item", "--pull", stage)
            lines = self._dvc(stage, *command, variables=variables, tick=progress.look, logged=True)
            self.seconds[stage] = time.monotonic() - started
        progress.look()
        cached = f"Running stage '{stage}':" not in lines
        entry = read_lock(self.root)[stage]
        if not cached:
            if not cache_of(self.root).holds(locked_outs(entry)):  # DVC logs a failing transfer and exits with 0
                raise _failure(stage, lines)
            self.push([stage])
        elif self.set_damaged_aside(locked_outs(entry)):
            for path in locked_outs(entry):
                _remove(self.root / path)
            return self.reproduce(stage, slot=slot, variables=variables, on_progress=on_progress)
        return StageResult(cached, entry)

    @contextmanager
    def _turn(self, stage: str) -> Iterator[None]:
        """Wait while another run of this machine makes exactly this result. Raises RunEnding."""
        known, waits = all_locked_outs(read_lock(self.root).values()), False
        key = stage_key(self.root, read_stages(self.root)[stage], known)

        def wait() -> None:
            nonlocal waits
            if self.ending:
                raise RunEnding(stage)
            if not waits:
                logger.info("%s: another run makes exactly this; waiting for it", stage)
            waits = True

        with named_lock(self.shared_root / LOCKS / f"{stage}-{key}", wait):
            yield

    def set_damaged_aside(self, outs: Mapping[str, str]) -> bool:
        """Move damaged objects of outputs {path: hash} out of the cache; return if there were any."""
        return set_damaged_aside(self.root, outs, self._md5)

    def _bring_inputs(self, stage: str) -> None:
        """Bring a stage's inputs and read their bytes, whose hashes are then on record for it."""
        stages = read_stages(self.root)
        if before := stages[stage].before:
            code, lines = self._run(shlex.split(before), {}, lambda: None, logged=False)
            if code:
                raise RunEnding(stage) if self.ending else _failure(stage, lines, code)
        if not (earlier := [one.name for one in upstream(stages[stage], stages)]):
            return
        self._dvc(stage, "pull", *earlier)
        if damaged := damaged_inputs(self.root, read_inputs(self.root, stages[stage], self._md5), self._md5):
            for path in damaged:
                _remove(self.root / path)
            self._dvc(stage, "pull", *earlier)

    def _dvc(
        self,
        stage: str,
        *arguments: str,
        variables: Mapping[str, str] | None = None,
        tick: Callable[[], None] = lambda: None,
        logged: bool = False,
    ) -> list[str]:
        """Run a DVC command for a stage and return its output; raises as `reproduce` does."""
        code, lines = self._run([*DVC, *arguments], variables or {}, tick, logged=logged)
        if code:
            raise RunEnding(stage) if self.ending else _failure(stage, lines)
        return lines

    def push(self, stages: Sequence[str]) -> None:
        """Push the results of stages to a shared DVC remote, if there is one; log a failure and continue."""
        url = shared_remote(self.shared_root)  # from the clone, a folder of the workspace would look like a remote
        if not stages or not url:
            return
        code, lines = self._run([*DVC, "push", "--run-cache", *stages], {}, lambda: None, logged=False)
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        if code or errors:  # if only the run cache fails to upload, DVC reports it and exits with 0
            self._unpushed += stages
            reason = next(iter(errors), lines[-1:])
            logger.warning("%s: not pushed to %s, tried again later: %s", ", ".join(stages), public_text(url), reason)

    def push_again(self) -> None:
        """Retry failed pushes once; see `push`."""
        stages, self._unpushed = self._unpushed, []
        self.push(stages)

    def _run(
        self, command: list[str], variables: Mapping[str, str], on_tick: Callable[[], None], *, logged: bool
    ) -> tuple[int, list[str]]:
        """Run a command in the clone and return its exit code and output; see `reproduce`."""
        lines = []
        with self._starting:
            if self.ending:
                raise RunEnding(" ".join(command[-2:]))
            process = Process(command, cwd=self.root, env={**self.environment(), **variables})
            self._running.add(process)
        try:
            for said in process.lines(on_tick=on_tick):
                line = printable(public_text(said))
                lines.append(line)
                if logged and line.strip() and not line.startswith(DVC_CHATTER) and not line.endswith(DVC_EMPTY):
                    logger.info("%s", line)
        finally:
            code = process.end()
            self._running.discard(process)
        return code, lines

    def edits(self) -> dict[str, Path]:
        """Return {name: file} of the patch with the uncommitted edits, if any."""
        patch = self.folder / EDITS_FILE
        return {EDITS_FILE: patch} if patch.exists() else {}

    def environment(self) -> dict[str, str]:
        """Return the environment in which a command runs this clone's code with the shared stores."""
        return {
            **os.environ,
            "CM_HOME": str(self.shared_root),
            "CM_LIFELINE": "stdin",
            "PYTHONPATH": str(self.root),
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "DVC_NO_ANALYTICS": "1",
        }

    def stop(self) -> None:
        """Stop all running commands at once: SIGTERM, then SIGKILL after the grace period."""
        with self._starting:
            self.ending, running = True, list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.end()


def _remove(path: Path) -> None:
    """Remove an output; DVC then takes it from its cache again."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def take_over(root: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Update the workspace `root` with a run's results from DVC's cache, by their entries of dvc.lock.

    Raises UserError if that would overwrite results that are not in the cache.
    """
    update_lock(root, entries)
    try:
        dvc(root, "checkout", *entries)
    except UserError as error:
        raise UserError(
            f"{root}: results that DVC does not know stand in the way of the run's; keep them with `dvc commit`, "
            f"or drop them with `dvc checkout --force` ({error})"
        ) from None


class _Progress:
    """A progress file, forwarded when it has changed."""

    def __init__(self, path: Path, on_progress: Callable[[dict[str, Any]], None]) -> None:
        path.unlink(missing_ok=True)
        self.path, self._on_progress = path, on_progress
        self._last: str | None = None

    def look(self) -> None:
        text = self.path.read_text() if self.path.exists() else None
        if text is not None and text != self._last:
            self._last = text
            self._on_progress(json.loads(text))


def _failure(stage: str, lines: list[str], code: int | None = None) -> Exception:
    """Return the error that the end of DVC's output describes, or that of `cm` with its exit code."""
    words = [line for line in lines if line.strip()]
    if words and code == USER_ERROR:
        return UserError(words[-1].removeprefix("cm: "))
    if words and words[-1].endswith(f", exited with {USER_ERROR}"):
        return UserError(words[-2].removeprefix("cm: "))
    if full := [line for line in words if any(says in line for says in DISK_FULL)]:
        return UserError(full[-1].removeprefix("ERROR: "))
    return StageFailed(f"{stage} failed:\n" + "\n".join(words[-20:]))
