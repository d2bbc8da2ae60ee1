"""Any checkpoint: find out what a file or folder is, and read it."""

from pathlib import Path

from safetensors import SafetensorError

from cm_core.checkpoint import load_tensors
from cm_core.formats.base import Checkpoint, Hints, UnreadableCheckpoint, adopt
from cm_core.formats.edm import read_edm
from cm_core.formats.openai import read_openai
from cm_core.formats.pickles import MALFORMED, ZIP
from cm_core.formats.single import read_single
from cm_core.formats.unet2d import CONFIG, WEIGHTS, read_diffusers
from cm_core.model import SPEC_FILE, WEIGHTS_FILE, load_spec

OWN = "this package", "that of its training images and initial weights"
PICKLE = b"\x80"  # its first byte


def read_checkpoint(path: Path, hints: Hints | None = None) -> Checkpoint:
    """Read a model of any known format, found out from the content; no code of the file is run.

    Raises UnreadableCheckpoint: one line that names the file, and why it cannot be read or converted rightly.
    """
    try:
        return _read(path, hints or Hints())
    except UnreadableCheckpoint as error:
        raise UnreadableCheckpoint(f"{path.name}: {_one_line(str(error))}") from error
    except MALFORMED as error:  # the content decides what goes wrong
        reason = _one_line(f"{type(error).__name__}: {error}", 200)
        raise UnreadableCheckpoint(f"{path.name}: truncated or malformed ({reason})") from error


def _one_line(text: str, longest: int = 300) -> str:
    """Return a message without what a file's names may bring into it: line breaks, control characters, endless text."""
    line = " ".join("".join(one if one.isprintable() else " " for one in text[: 10 * longest]).split())
    return line if len(line) <= longest else f"{line[:longest]} ..."


def _read(path: Path, hints: Hints) -> Checkpoint:
    if path.is_dir():
        if (path / SPEC_FILE).is_file():
            return _read_own(path)
        if (path / "unet").is_dir() or (path / CONFIG).is_file():
            return read_diffusers(path, hints)
        raise UnreadableCheckpoint(f"a folder with neither {SPEC_FILE} (this package) nor {CONFIG} (diffusers)")
    with path.open("rb") as file:
        start = file.read(len(ZIP))
        file.seek(0)
        if path.name in WEIGHTS or path.suffix == ".safetensors":
            if path.name == WEIGHTS_FILE and (path.parent / SPEC_FILE).is_file():
                return _read_own(path.parent)
            return _read_single(path) or read_diffusers(path, hints)
        if start == ZIP:
            return read_openai(path, hints)
        if start.startswith(PICKLE):
            return read_edm(file, hints)
    raise UnreadableCheckpoint("neither a pickle, nor a file of torch.save, nor one of safetensors")


def _read_single(path: Path) -> Checkpoint | None:
    try:
        return None if path.suffix != ".safetensors" else read_single(path, *OWN)
    except SafetensorError as error:
        raise UnreadableCheckpoint("no whole safetensors file") from error


def _read_own(folder: Path) -> Checkpoint:
    try:
        spec, weights = load_spec(folder), load_tensors(folder / WEIGHTS_FILE)
    except (ValueError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableCheckpoint(f"no whole {SPEC_FILE} and {WEIGHTS_FILE} ({reason})") from error
    return Checkpoint(*OWN, spec, adopt(spec, weights, lambda name: name.removeprefix("net.")))
