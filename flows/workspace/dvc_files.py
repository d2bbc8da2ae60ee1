"""DVC's files, read without starting DVC: declared stages, locked versions, hashes, cached objects; its commands."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.errors import UserError
from flows.storage.digests import file_digest

NONFINITE_POLICY = ("on_nonfinite", "max_nonfinite")  # fields of the section train
OBJECTS, DAMAGED = "files/md5", "damaged"  # folders in a cache
STAGES_FILE, LOCK_FILE, PARAMS_FILE = "dvc.yaml", "dvc.lock", "params/active.yaml"
DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
FileHash = Callable[[Path], str]
# What a stage may need, as `meta: {needs: ...}` in dvc.yaml; with `gpu_for: KEY`, the GPU if the recipe has KEY, with
# `cpu_for: KEY`, no GPU if it has that one.
GPU, CPU = "gpu", "cpu"


def dvc(root: Path, *arguments: str) -> str:
    """Run a DVC command in a workspace and return its output. Raises UserError with DVC's reason."""
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run([*DVC, *arguments], cwd=root, env=environment, **streams, check=False)
    if done.returncode:
        raise UserError(f"{root}: dvc {' '.join(arguments)} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def check_user_settings() -> str:
    """Read DVC's settings of this machine and user. Raises UserError with the file, which DVC's own error lacks."""
    from dvc.config import Config, ConfigError

    files = [Path(Config.get_dir(level)) / Config.CONFIG for level in Config.SYSTEM_LEVELS]
    files = [file for file in files if file.is_file()]
    for file in files:
        try:
            Config.validate(Config.load_file(str(file)))
        except (ConfigError, OSError) as error:
            raise UserError(f"{file}: {' '.join(str(error).split())}") from None
    return ", ".join(map(str, files)) or "those of the workspace alone"


@dataclass(frozen=True)
class Stage:
    """A stage as dvc.yaml declares it; paths are relative to the workspace."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    """Input artifacts and code files."""
    params: tuple[str, ...]
    """Sections of params/active.yaml."""
    outs: tuple[str, ...]
    """Outputs, metrics and plots."""
    needs: str = GPU
    """The processor that it keeps busy, by default the GPU."""
    before: str = ""
    """A command that brings and reads its inputs from outside the workspace, run before a GPU is waited for."""


def read_stages(root: Path) -> dict[str, Stage]:
    """Return the stages of `root`/dvc.yaml, each after the stages it reads from."""
    params = load_yaml(root / PARAMS_FILE) if (root / PARAMS_FILE).is_file() else {}
    stages = {name: _stage(name, entry, params) for name, entry in load_yaml(root / STAGES_FILE)["stages"].items()}
    ordered: dict[str, Stage] = {}
    for stage in stages.values():
        _place(stage, stages, ordered)
    return ordered


def upstream(stage: Stage, stages: Mapping[str, Stage]) -> list[Stage]:
    """Return the stages whose outputs `stage` depends on."""
    return [other for other in stages.values() if set(other.outs) & set(stage.deps)]


def ancestors(stage: Stage, stages: Mapping[str, Stage]) -> set[str]:
    """Return the names of all stages upstream of `stage`."""
    return {name for earlier in upstream(stage, stages) for name in (earlier.name, *ancestors(earlier, stages))}


def _place(stage: Stage, stages: Mapping[str, Stage], ordered: dict[str, Stage]) -> None:
    for earlier in upstream(stage, stages):
        _place(earlier, stages, ordered)
    ordered.setdefault(stage.name, stage)


def _stage(name: str, entry: Mapping[str, Any], params: Mapping[str, Any]) -> Stage:
    outs = [path for kind in ("outs", "metrics", "plots") for path in _names(entry.get(kind, ()))]
    sections = [section for file in entry.get("params", ()) for section in file[PARAMS_FILE]]
    deps = tuple(_names(entry.get("deps", ())))
    meta = entry.get("meta", {})
    return Stage(name, entry["cmd"], deps, tuple(sections), tuple(outs), _needs(meta, params), meta.get("before", ""))


def _needs(meta: Mapping[str, str], params: Mapping[str, Any]) -> str:
    """Return the processor of a stage, by the values of the recipe that its `cpu_for` and `gpu_for` name."""

    def has(key: str) -> bool:
        value: Any = params if key in meta else None
        for part in meta.get(key, "").split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value is not None

    if has("cpu_for"):
        return CPU
    return GPU if has("gpu_for") else meta.get("needs", Stage.needs)


def _names(entries: Iterable[str | Mapping[str, Any]]) -> Iterator[str]:
    """Yield the paths of a DVC list, whose items are a path or {path: options}."""
    for entry in entries:
        yield from [entry] if isinstance(entry, str) else entry


def load_yaml(path: Path) -> dict[str, Any]:
    """Read YAML as DVC does (1.2: 1e-05 is a number), so that it can be written back unchanged."""
    from dvc.utils.serialize import load_yaml

    return load_yaml(str(path))


@contextmanager
def hold_dvc(root: Path) -> Iterator[None]:
    """Lock `root` against DVC commands, which wait (see --wait-for-lock), as does this function."""
    from dvc.lock import Lock

    folder = root / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(str(folder / "lock"), wait=True):
        yield


def read_lock(root: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of `root`/dvc.lock by stage: the inputs and outputs of its last run."""
    with hold_dvc(root):
        return _read_lock(root)


def _read_lock(root: Path) -> dict[str, dict[str, Any]]:
    path = root / LOCK_FILE
    return load_yaml(path).get("stages", {}) if path.exists() else {}


def update_lock(root: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Put stage entries into `root`/dvc.lock, in DVC's own notation."""
    from dvc.utils.serialize import dump_yaml

    with hold_dvc(root):
        before = _read_lock(root)
        after = {**before, **entries}
        if after != before:
            dump_yaml(str(root / LOCK_FILE), {"schema": "2.0", "stages": after})


def locked_outs(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return {path: DVC hash} of the outputs in an entry of dvc.lock."""
    return {out["path"]: out["md5"] for out in entry.get("outs", ())}


def all_locked_outs(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return {path: DVC hash} of the outputs in several entries of dvc.lock."""
    return {path: md5 for entry in entries for path, md5 in locked_outs(entry).items()}


def version(outs: Mapping[str, str]) -> str:
    """Identify a stage's outputs by one hash: that of its only output, or a digest of all of them."""
    return next(iter(outs.values())) if len(outs) == 1 else _digest(dict(outs))


def stage_key(root: Path, stage: Stage, known: Mapping[str, str]) -> str:
    """Return a digest of the inputs that determine a stage's results; see `stage_facts`."""
    return _digest(stage_facts(root, stage, known))


def training_key(root: Path, stage: Stage, known: Mapping[str, str]) -> str:
    """Return a digest of the inputs that determine a stage's training states.

    The policy for losses that are not finite is left out: until one occurs all trainings are the same, and a state
    saved under one policy continues under another.
    """
    cmd, deps, params, outs = stage_facts(root, stage, known)
    for section in params.values():
        for name in NONFINITE_POLICY if isinstance(section, dict) and "train" in section else ():
            section["train"].pop(name, None)
    return _digest([cmd, deps, params, outs])


def stage_facts(root: Path, stage: Stage, known: Mapping[str, str]) -> list[Any]:
    """Return the inputs that determine a stage's results: command, dependencies, params, names of outputs.

    `known` gives hashes of input artifacts, which are then not read from the workspace. Raises UserError for a params
    file that lacks a section.
    """
    params = load_yaml(root / PARAMS_FILE)
    if missing := [section for section in stage.params if section not in params]:
        raise UserError(
            f"{PARAMS_FILE}: has no section {missing[0]}, which came with a newer version; `cm use` a recipe"
        )
    deps = {path: known.get(path) or dvc_md5(root / path) for path in stage.deps}
    return [stage.cmd, deps, {section: params[section] for section in stage.params}, stage.outs]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_md5(path: Path) -> str:
    """Return the MD5 of a file's bytes."""
    return file_digest(path, "md5")


def dvc_md5(path: Path, md5: FileHash = file_md5) -> str:
    """Return DVC's hash of a file, or of a folder: the MD5 of its sorted listing, with the suffix .dir."""
    if path.is_file():
        return md5(path)
    if not path.is_dir():
        raise UserError(f"{path}: missing; bring its stage up to date with `dvc repro`")
    listing = [{"md5": md5(file), "relpath": name} for name, file in files_in(path).items()]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def files_in(folder: Path) -> dict[str, Path]:
    """Return {path below the folder: file}, sorted, without the compiled code that .dvcignore hides from DVC."""
    files = ((file.relative_to(folder), file) for file in folder.rglob("*") if file.is_file())
    return dict(sorted((name.as_posix(), file) for name, file in files if "__pycache__" not in name.parts))


@dataclass(frozen=True)
class Cache:
    """The objects in DVC's cache folder, by hash."""

    folder: Path

    def files(self, md5: str) -> dict[str, Path]:
        """Return {path below the output: cached object}; the path is empty if the output is a file.

        Raises FileNotFoundError if the listing of a folder is not in the cache.
        """
        if not md5.endswith(".dir"):
            return {"": self._object(md5)}
        listing = json.loads(self._object(md5).read_text())
        return {entry["relpath"]: self._object(entry["md5"]) for entry in listing}

    def holds(self, outs: Mapping[str, str]) -> bool:
        """Whether every object of these outputs {path: hash} is there."""
        try:
            return all(file.exists() for md5 in outs.values() for file in self.files(md5).values())
        except FileNotFoundError:
            return False

    def objects(self) -> list[Path]:
        """Return all objects, sorted, without those that DVC is writing."""
        return sorted(path for path in (self.folder / OBJECTS).glob("*/[!.]*") if path.is_file())

    def damaged(self, outs: Mapping[str, str], md5: FileHash) -> dict[Path, Path]:
        """Return {object: file of the outputs {path: hash}} where the bytes are not those of the hash.

        Objects that are missing are left out.
        """
        found: dict[Path, Path] = {}
        for path, digest in outs.items():
            listing = self._object(digest)
            if is_damaged(listing, md5):
                found[listing] = Path(path)
            elif listing.exists():
                below = self.files(digest).items()
                found |= {file: Path(path, name) for name, file in below if is_damaged(file, md5)}
        return found

    def set_aside(self, file: Path) -> Path:
        """Move an object to where DVC does not find it, and return its new place."""
        place = self.folder / DAMAGED / _hash_in(file)
        place.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another process was faster
            file.rename(place)
        return place

    def _object(self, md5: str) -> Path:
        return self.folder / OBJECTS / md5[:2] / md5[2:]


def is_damaged(file: Path, md5: FileHash) -> bool:
    """Whether an object of the cache is there and holds other bytes than its name says."""
    return file.exists() and md5(file) != _hash_in(file).removesuffix(".dir")


def _hash_in(file: Path) -> str:
    """Return the hash by which an object is named."""
    return file.parent.name + file.name
