"""A flow run's own clone of the workspace, and DVC at work in it.

Two runs in one workspace block each other, so each gets a clone at a recorded revision, with the uncommitted edits
of the workspace as a commit of their own. All clones share that workspace's DVC cache: what one computed, all have.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.atomic import try_lock
from flows.errors import USER_ERROR, RunEnding, StageFailed, UserError
from flows.workspace.dvc_files import DVC, LOCK_FILE, locked_outs, read_lock, update_lock
from flows.workspace.git import commit_edits, git, revision, uncommitted_patch
from flows.workspace.locations import cache_of, shared_remote, shared_root
from flows.workspace.process import Process

logger = logging.getLogger(__name__)
CLONE, EDITS_FILE, LIVE_FILE, DONE_FILE = "workspace", "edits.patch", "live", "done"
KEPT_DONE, KEPT_FAILED = 2, 5  # folders of finished runs; a failed one serves debugging
MAX_NAME = 60  # characters of a run's name in its folder's; overrides can make it longer than a file system takes
DVC_EMPTY = "__init__.py' is empty."  # how DVC ends its warning of a package without text
DVC_CHATTER = (  # advice and bookkeeping that says nothing about the stage
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
    """What bringing a stage up to date came to."""

    cached: bool
    """Whether DVC had the outputs already, so that nothing ran."""
    entry: dict[str, Any]
    """The stage's entry in dvc.lock."""

    @property
    def outs(self) -> dict[str, str]:
        """DVC hash of every output, by path."""
        return locked_outs(self.entry)


def clone(root: Path, run_name: str) -> "Workspace":
    """Clone the workspace `root`, uncommitted edits included, for one run.

    Raises:
        UserError: `root` is not the top of a git repository with a commit, or holds edits too large to capture.
    """
    commit = revision(root)
    folder = _make_folder(root / ".cm" / "runs", run_name)
    target = folder / CLONE
    git(root, "clone", "--quiet", "--local", "--no-checkout", str(root), str(target))
    git(target, "checkout", "--quiet", "--detach", commit)
    edits = uncommitted_patch(root)
    if edits:
        (folder / EDITS_FILE).write_bytes(edits)
        commit_edits(target, folder / EDITS_FILE, run_name)
    if (root / LOCK_FILE).exists():
        shutil.copyfile(root / LOCK_FILE, target / LOCK_FILE)
    _share_dvc(root, target)
    return Workspace(folder, shared_root(root), commit)


def _make_folder(runs: Path, run_name: str) -> Path:
    """Make the run's own folder, after removing those of old runs."""
    runs.mkdir(parents=True, exist_ok=True)
    _clean(runs)
    safe = re.sub(r"[^\w.-]+", "-", run_name).strip("-.")
    return Path(tempfile.mkdtemp(prefix=f"{safe[:MAX_NAME]}-", dir=runs))


def _clean(runs: Path) -> None:
    """Drop all but the newest folders of runs that ended; a live run holds a lock on its own."""
    ended = sorted((folder for folder in runs.iterdir() if not is_live(folder)), key=lambda f: -f.stat().st_mtime)
    done = [folder for folder in ended if (folder / DONE_FILE).exists()]
    failed = [folder for folder in ended if folder not in done]
    for folder in done[KEPT_DONE:] + failed[KEPT_FAILED:]:
        shutil.rmtree(folder, ignore_errors=True)  # two runs may clean at once


def is_live(folder: Path) -> bool:
    """Whether the run of this folder goes on."""
    try:
        with (folder / LIVE_FILE).open("a") as file:
            return not try_lock(file)
    except FileNotFoundError:  # another run is removing it at this moment
        return True


def _share_dvc(root: Path, target: Path) -> None:
    """Give the clone the DVC cache and remotes of `root` (its own relative paths would lead elsewhere).

    What comes from a remote is always verified: DVC would otherwise trust the name of damaged bytes.
    """
    from dvc.config import Config

    own = Config(str(root / ".dvc")).read("local")
    remotes = {**Config(str(root / ".dvc")).read("repo")["remote"], **own["remote"]}
    with Config(str(target / ".dvc")).edit("local") as local:
        local.update(own)
        local["cache"]["dir"] = str(cache_of(root).folder)
        for name, remote in remotes.items():
            local["remote"][name] = {**local["remote"].get(name, {}), "url": str(remote["url"]), "verify": True}


class Workspace:
    """The clone of one run. Leave it (it is a context manager) and whatever still runs in it is ended."""

    def __init__(self, folder: Path, shared_root: Path, revision: str) -> None:
        self.folder, self.root, self.shared_root = folder, folder / CLONE, shared_root
        self.revision = revision
        self._live = (folder / LIVE_FILE).open("w")
        fcntl.flock(self._live, fcntl.LOCK_EX)
        self.seconds: dict[str, float] = {}  # by stage, as long as DVC was at work for it
        self._unpushed: list[str] = []  # stages whose results the remote did not take
        self._running: set[Process] = set()
        self._stopping, self._starting = False, threading.Lock()

    def __enter__(self) -> "Workspace":
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
        variables: Mapping[str, str] | None = None,
        on_progress: Callable[[dict[str, Any]], None] = lambda progress: None,
    ) -> StageResult:
        """Bring one stage up to date through DVC, its inputs taken from the cache or the remote where missing.

        `variables` are added to its environment; its output is logged, `on_progress` gets its progress.
        Raises UserError where the stage did, StageFailed for any other bad end, RunEnding after `stop`.
        """
        progress = _Progress(self.folder / f"progress-{stage}.json", on_progress)
        started = time.monotonic()
        command = [*DVC, "repro", "--single-item", "--pull", stage]
        variables = {"CM_PROGRESS_FILE": str(progress.path), **(variables or {})}
        code, lines = self._run(command, variables, progress.look, logged=True)
        progress.look()
        if code:
            raise RunEnding(stage) if self._stopping else _failure(stage, lines)
        cached = f"Running stage '{stage}':" not in lines
        self.seconds[stage] = time.monotonic() - started
        if not cached:
            self.push([stage])
        return StageResult(cached, read_lock(self.root)[stage])

    def push(self, stages: Sequence[str]) -> None:
        """Give the results of stages to DVC's remote if others share it; say why where that fails, and go on."""
        url = shared_remote(self.shared_root)  # seen from the clone, a folder of the workspace would look like a remote
        if not stages or not url:
            return
        code, lines = self._run([*DVC, "push", "--run-cache", *stages], {}, lambda: None, logged=False)
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        if code or errors:  # where only records of runs fail to travel, DVC says so and exits with 0
            self._unpushed += stages
            reason = next(iter(errors), lines[-1:])
            logger.warning("%s: not pushed to %s, tried again later: %s", ", ".join(stages), url, reason)

    def push_again(self) -> None:
        """Try once more to push what the remote did not take; see `push`."""
        stages, self._unpushed = self._unpushed, []
        self.push(stages)

    def _run(
        self, command: list[str], variables: Mapping[str, str], on_tick: Callable[[], None], *, logged: bool
    ) -> tuple[int, list[str]]:
        """Run a command in the clone and return its exit code and output; see `reproduce`."""
        lines, process = [], self._start(command, variables)
        try:
            for line in process.lines(on_tick=on_tick):
                lines.append(line)
                if logged and line.strip() and not line.startswith(DVC_CHATTER) and not line.endswith(DVC_EMPTY):
                    logger.info("%s", line)
        finally:
            code = process.end()
            self._running.discard(process)
        return code, lines

    def _start(self, command: list[str], variables: Mapping[str, str]) -> Process:
        with self._starting:
            if self._stopping:
                raise RunEnding(" ".join(command[-2:]))
            process = Process(command, cwd=self.root, env={**self.environment(), **variables})
            self._running.add(process)
        return process

    def edits(self) -> dict[str, Path]:
        """Return {name: file} of the patch with the uncommitted edits, if there were any."""
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

    @property
    def ending(self) -> bool:
        """Whether the run ends, so that nothing more is to begin."""
        return self._stopping

    def stop(self) -> None:
        """End every command that still runs, all at once: SIGTERM, then SIGKILL when the grace is over."""
        with self._starting:
            self._stopping, running = True, list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.end()


def take_over(root: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put results that a run left in DVC's cache, by their entries of dvc.lock, in force in the workspace `root`.

    Raises UserError where results would be overwritten that are not in the cache.
    """
    update_lock(root, entries)
    done = subprocess.run(
        [*DVC, "checkout", *entries], cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(
            f"{root}: results that DVC does not know stand in the way of the run's; keep them with `dvc commit`, "
            f"or drop them with `dvc checkout --force` ({' '.join(done.stderr.split())})"
        )


class _Progress:
    """A progress file, passed on when it has changed."""

    def __init__(self, path: Path, on_progress: Callable[[dict[str, Any]], None]) -> None:
        path.unlink(missing_ok=True)
        self.path, self._on_progress = path, on_progress
        self._last: str | None = None

    def look(self) -> None:
        text = self.path.read_text() if self.path.exists() else None
        if text is not None and text != self._last:
            self._last = text
            self._on_progress(json.loads(text))


def _failure(stage: str, lines: list[str]) -> Exception:
    """Return the error that the end of DVC's output speaks of."""
    words = [line for line in lines if line.strip()]
    if words and words[-1].endswith(f", exited with {USER_ERROR}"):
        return UserError(words[-2].removeprefix("cm: "))
    return StageFailed(f"{stage} failed:\n" + "\n".join(words[-20:]))
