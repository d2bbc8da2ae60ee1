"""Any checkpoint: find out what a file or folder is, and read it."""

from pathlib import Path

from safetensors import SafetensorError

from cm_core.checkpoint import load_tensors
from cm_core.formats.base import Checkpoint, Hints, UnreadableCheckpoint, adopt
from cm_core.formats.edm import read_edm
from cm_core.formats.openai import read_openai
from cm_core.formats.pickles import MALFORMED
from cm_core.formats.single import read_single
from cm_core.formats.unet2d import CONFIG, WEIGHTS, read_diffusers
from cm_core.model import SPEC_FILE, WEIGHTS_FILE, load_spec

OWN = "this package", "that of its training images and initial weights"
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # first bytes; a zip is what torch.save writes


def read_checkpoint(path: Path, hints: Hints | None = None) -> Checkpoint:
    """Read a model of any known format, found out from the content; no code of the file is run.

    Raises UnreadableCheckpoint: one line that names the file, and why it cannot be read or converted rightly.
    """
    try:
        return _read(path, hints or Hints())
    except UnreadableCheckpoint as error:
        raise UnreadableCheckpoint(f"{path.name}: {error}") from error
    except MALFORMED as error:  # the content decides what goes wrong
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnreadableCheckpoint(f"{path.name}: truncated or malformed ({reason})") from error


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
