"""A model of this package as one safetensors file, its spec among the metadata."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from cm_core.checkpoint import save_tensors
from cm_core.formats.base import Checkpoint, adopt
from cm_core.model import SPEC_FILE, ModelSpec


def write_single(path: Path, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
    """Write weights and spec, atomically."""
    save_tensors(path, weights, metadata={SPEC_FILE: spec.model_dump_json()})


def read_single(path: Path, format: str, licence: str) -> Checkpoint | None:
    """Read the output of `write_single`; None for a file without a spec. Raises ValueError for a damaged one."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if SPEC_FILE not in metadata:
            return None
        spec = ModelSpec.model_validate_json(metadata[SPEC_FILE])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return Checkpoint(format, licence, spec, adopt(spec, tensors, lambda name: name.removeprefix("net.")))
