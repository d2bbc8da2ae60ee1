"""The requests of the page, each run as the `cm sample` or `cm edit` command that the page then shows."""

import base64
import io
import os
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, field_validator, model_validator

from flows.commands import edit, models, sample
from flows.commands.drawing import TEACHER_STEPS, Context, draw, load, locate, to_image
from flows.commands.editor import Editor, check_task, factors
from flows.commands.runs import tracker_of
from flows.errors import UserError
from flows.monitor import Monitor
from flows.workspace.locations import workspace_root

if TYPE_CHECKING:
    import numpy as np

    from cm_core.model import ModelSpec
    from cm_core.precond import Precond

Task = Literal["sample", "inpaint", "colorize", "superres", "stroke", "interpolate", "denoise"]
EDITS = get_args(Task)[1:]
FEW_STEPS = (1, 2, 4)  # network calls that the page offers for samples
MAX_STEPS, MAX_IMAGES = 200, 64
LONGEST_NAME = 255  # bytes of a file's name, of file systems
DEFAULTS = {
    "steps": {
        **dict.fromkeys(("inpaint", "colorize", "superres"), edit.FILLING_STEPS),
        **{"stroke": edit.STROKE_STEPS, "denoise": 1},
    },
    "sigma": {"stroke": edit.STROKE_SIGMA},
}


class File(BaseModel):
    """A picture of the page, its bytes as base64."""

    name: str
    data: Base64Bytes

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        if "/" in name or not name.isprintable() or name in ("", ".", "..") or len(name.encode()) > LONGEST_NAME:
            raise ValueError("must be the plain name of a file")
        return name


class Command(BaseModel):
    """`cm sample` or a task of `cm edit` with its options, which the command itself checks."""

    model_config = ConfigDict(extra="forbid")

    model: str
    task: Task
    picture: File | None = None
    mask: File | None = None
    seeds: tuple[int, int] | None = None
    factor: int | None = None
    sigma: float | None = None
    label: int | None = None
    guidance: float | None = None
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    seed: int | None = None
    n: int = Field(1, ge=1, le=MAX_IMAGES)

    @model_validator(mode="after")
    def _files_have_names_of_their_own(self) -> "Command":
        if self.picture and self.mask and self.picture.name == self.mask.name:
            raise ValueError(f"{self.mask.name}: picture and mask must have different names")
        return self

    def words(self, folder: Path | None = None) -> list[str]:
        """Return the command after `cm`; its pictures lie in `folder`, or where the user has them."""
        words = ["sample"] if self.task == "sample" else ["edit", self.task]
        for option, file in (("", self.picture), ("--mask", self.mask)):
            if file is not None:
                own = f"./{file.name}" if file.name.startswith("-") else file.name
                words += [*filter(None, [option]), str(folder / file.name) if folder else own]
        for option in ("seeds", "factor", "sigma", "label", "guidance", "model", "steps", "seed", "n"):
            value = getattr(self, option)
            if value is not None:
                words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
        return words


class Studio:
    """One model in memory, and what is drawn with it, one request after the other."""

    def __init__(self, scratch: Path, model: str | None = None) -> None:
        self._scratch, self._given, self._drawing = scratch, model, Lock()
        self._loaded: tuple[object, tuple[ModelSpec, Precond]] | None = None
        try:
            self._root: Path | None = workspace_root()
        except UserError:
            if model is None:
                raise
            self._root = None  # a model in a folder can be played with anywhere
        self._offered: set[str] = set()
        self._parser = _Parser(prog="cm")
        commands = self._parser.add_subparsers()
        for group in (sample, edit):
            group.add_parsers(commands)

    def local_models(self) -> dict[str, str]:
        """Return the model given and those of the workspace, {name: text}."""
        found = {self._given: self._given} if self._given else {}
        folders = sorted(path.parent for path in (self._root / "out").glob("*/model.json")) if self._root else []
        found |= {os.path.relpath(folder): f"{folder.name} of this workspace" for folder in folders}
        self._offered |= found.keys()
        return found

    def registered_models(self) -> dict[str, str]:
        """Return the registered versions, {name: text}, newest first. Raises UserError if MLflow does not answer."""
        tracker = tracker_of(self._root) if self._root else None
        if tracker is None:
            return {}
        from mlflow.exceptions import MlflowException

        from flows.tracking.registry import Registry

        found = {}
        try:
            registry = Registry(tracker)
            for model in map(registry.read, registry.names()):
                for version in reversed(model.versions.values()):
                    told = models.describe(model, version)
                    traits = ", ".join(filter(None, [*told["aliases"], told["recipe"]]))
                    found[f"models:/{model.name}/{version.number}"] = f"{model.name} {version.number}: {traits}"
        except MlflowException as error:
            raise UserError(f"registered models cannot be listed: {' '.join(str(error).split())}") from error
        self._offered |= found.keys()
        return found

    def describe(self, model: str) -> dict[str, Any]:
        """Load a model; return its shape, classes and what can be done with it, for what cannot the reason."""
        with self._drawing:
            spec, _ = self._load(model)
        channels, height, width = spec.pixel_shape
        fixed = TEACHER_STEPS if spec.form == "denoiser" else spec.fixed_steps
        steps = list(FEW_STEPS) if fixed is None else [fixed]
        low, high = spec.guidance_range or (None, None)
        guidance = None if spec.guidance is None else {"min": low, "max": high, "value": spec.guidance}
        refused = {}
        for task in EDITS:
            try:
                check_task(task, spec, model)
            except UserError as error:
                refused[task] = str(error).removeprefix(f"{model}: ")
        return {
            **{"channels": channels, "height": height, "width": width, "classes": spec.num_classes, "steps": steps},
            **{"guidance": guidance, "factors": factors(spec), "refused": refused, "defaults": DEFAULTS},
        }

    def read(self, command: Command) -> dict[str, Any]:
        """Return a picture as the model sees it, and what was done to it."""
        with self._opened(command) as (args, context, notes):
            return {"image": to_png(Editor(args, context).read(args.image)[0]), "notes": notes}

    def draw(self, command: Command) -> dict[str, Any]:
        """Return images with what they were made from, their time, and the command that writes the same."""
        with self._opened(command) as (args, context, notes):
            drawn = draw(args.model, args, context) if command.task == "sample" else args.task(args, context)
        return {
            "images": [to_png(pixels) for pixels in drawn.images],
            "shown": {name: to_png(pixels) for name, pixels in drawn.shown.items()},
            "milliseconds": 1000 * drawn.seconds,
            "how": drawn.how,
            "notes": notes,
            "command": shlex.join(["cm", *command.words()]),
            "out": str(args.out),
        }

    @contextmanager
    def _opened(self, command: Command) -> Iterator[tuple[Namespace, Context, list[str]]]:
        """Wait for other drawings; yield the parsed options, the context to draw in, and the notes taken there."""
        notes: list[str] = []
        with self._drawing, TemporaryDirectory(dir=self._scratch) as folder:
            for file in filter(None, (command.picture, command.mask)):
                (Path(folder) / file.name).write_bytes(file.data)
            try:
                args = self._parser.parse_args(command.words(Path(folder)))
                yield args, Context(self._load, notes.append, lambda _: nullcontext(Monitor())), notes
            except UserError as error:
                raise UserError(str(error).replace(f"{folder}/", "")) from error
            notes[:] = [note.replace(f"{folder}/", "") for note in notes]

    def _load(self, model: str) -> "tuple[ModelSpec, Precond]":
        """Return the model in memory, unless it is another one or its files have changed."""
        if model not in self._offered:
            raise UserError(f"{model}: not among the models that the page offers; reload it")
        changed = max((path.stat().st_mtime_ns for path in locate(model).glob("*")), default=0)
        if self._loaded is None or self._loaded[0] != (model, changed):
            self._loaded = None  # two may not fit
            self._loaded = (model, changed), load(model)
        return self._loaded[1]


class _Parser(ArgumentParser):
    """Parser that raises its complaints."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def to_png(pixels: "np.ndarray") -> str:
    """Return one image, uint8 [H, W, 1 or 3], as the base64 of a PNG."""
    buffer = io.BytesIO()
    to_image(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
