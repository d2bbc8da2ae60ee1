"""A weaker teacher that guides the teacher's samples (autoguidance, 2406.02507)."""

from pathlib import Path

import torch
from pydantic import Field, model_validator

from cm_core.formats.base import Hints, UnreadableCheckpoint
from cm_core.formats.read import read_checkpoint
from cm_core.model import ModelSpec
from cm_core.params import Params
from cm_core.precond import Precond
from flows.errors import UserError
from flows.monitor import Monitor
from flows.storage.fetch import download_dir, is_local
from flows.storage.locate import locate


class WeakTeacher(Params):
    """A checkpoint of a smaller or less trained teacher of the same images."""

    weights: str | None = None
    """The checkpoint: a path, s3:// or https:// address; empty: none."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Checksum it must have; of a local path it is recorded by itself."""

    @model_validator(mode="after")
    def _pinned(self) -> "WeakTeacher":
        if self.weights and not self.sha256 and not is_local(self.weights):
            raise ValueError(f"weights={self.weights} needs its sha256")
        return self

    def load(self, wanted: ModelSpec, autocast: torch.dtype | None, m: Monitor) -> Precond | None:
        """Return the denoiser, on the CPU, if there is one. Raises UserError unless it makes the teacher's images."""
        if self.weights is None:
            return None
        into = download_dir(self.sha256) if self.sha256 else Path()
        path, _ = locate(self.weights, into, self.sha256, m)
        hints = Hints("denoiser", wanted.image_shape[1], getattr(wanted.network, "channels_per_head", None))
        try:
            found = read_checkpoint(path, hints)
        except (UnreadableCheckpoint, ValueError) as error:
            raise UserError(f"sample.weak_teacher.weights: {error}") from error
        for key in ("form", "image_shape", "num_classes"):
            theirs, ours = getattr(found.spec, key), getattr(wanted, key)
            if theirs != ours:
                raise UserError(f"sample.weak_teacher.weights: {key} is {theirs!r}, and the teacher's is {ours!r}")
        model = found.spec.build(autocast=autocast)
        model.load_state_dict(found.weights)
        return model.eval().requires_grad_(False)
