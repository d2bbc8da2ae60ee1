"""Atomic files of tensors: a reader sees a whole file or none. safetensors: loading runs no code."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to `path` atomically: a temporary file beside it, flushed, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    flush(temporary)
    os.replace(temporary, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors onto the CPU."""
    return load_file(path)


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
