"""A teacher or student read from a public checkpoint instead of trained: the same artifact, with its origin."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from cm_core.formats.base import Checkpoint, Hints, UnreadableCheckpoint
from cm_core.formats.convert import without_classes
from cm_core.formats.read import read_checkpoint
from cm_core.model import ModelSpec, save_model
from cm_core.params import Params
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages.models import ORIGIN_FILE
from flows.storage.fetch import download_dir
from flows.storage.locate import locate

SHARED = ("form", "image_shape", "num_classes", "guidance_range")  # by the file's model and the recipe's
TRAINING_ONLY = ("dropout", "dropout_resolution")  # of a network; sampling ignores them


class Weights(Params):
    """A model that may be read from a checkpoint instead of trained."""

    weights: str | None = None
    """Checkpoint that is used as it is, in place of a training: a path, s3:// or https:// address; empty: trained."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Checksum the checkpoint must have; empty accepts any and records its checksum."""
    drop_classes: bool = False
    """Leave out a conditional checkpoint's layer of class labels, for a recipe without labels."""

    @property
    def is_imported(self) -> bool:
        """Whether nothing is trained."""
        return self.weights is not None


def write_imported(section: Weights, role: str, wanted: ModelSpec, out_dir: Path, state_dir: Path, m: Monitor) -> None:
    """Write a checkpoint as the artifact of a stage, as the recipe's model `wanted` with the file's conventions.

    Raises UserError if it cannot be had or read, or is another model than the recipe's.
    """
    assert section.weights is not None
    into = download_dir(section.sha256) if section.sha256 else state_dir / "weights"
    path, sha256 = locate(section.weights, into, section.sha256, m)
    hints = Hints(wanted.form, wanted.image_shape[1], getattr(wanted.network, "channels_per_head", None))
    try:
        found = read_checkpoint(path, hints)
        if section.drop_classes and not wanted.num_classes:
            found = without_classes(found)
        spec = fitted(found.spec, wanted)
    except (UnreadableCheckpoint, ValueError) as error:
        raise UserError(f"{role}.weights: {error}") from error
    save_model(out_dir, spec, found.weights)
    (out_dir / ORIGIN_FILE).write_text(json.dumps(origin(sha256, found), indent=2) + "\n")
    m.remark(f"imported, not trained: {found.format}, licence {found.licence}, SHA-256 {sha256}")


def origin(sha256: str, found: Checkpoint) -> dict[str, str]:
    """Return what an artifact records of the checkpoint; not its address, under which the same file is another one."""
    return {"sha256": sha256, "format": found.format, "licence": found.licence}


def fitted(found: ModelSpec, wanted: ModelSpec) -> ModelSpec:
    """Return the recipe's spec with the file's conventions (noise_scale, augmentation); its range of noise holds.

    Raises ValueError, one line, if the file's model is not the recipe's.
    """
    for key, theirs, ours in _facts(found, wanted):
        if theirs != ours:
            raise ValueError(f"{key} is {theirs!r} in the file and {ours!r} in the recipe")
    return wanted.model_copy(update={"noise_scale": found.noise_scale, "augment_dim": found.augment_dim})


def _facts(found: ModelSpec, wanted: ModelSpec) -> list[tuple[str, Any, Any]]:
    """Return (key, file's value, recipe's value) of all that must agree, the most telling first."""
    facts = [(key, getattr(found, key), getattr(wanted, key)) for key in SHARED]
    networks = [spec.network.model_dump(mode="json", exclude=set(TRAINING_ONLY)) for spec in (found, wanted)]
    kinds = [network["kind"] for network in networks]
    facts.append(("network.kind", *kinds))
    if kinds[0] == kinds[1]:
        facts += [(f"network.{key}", value, networks[1][key]) for key, value in networks[0].items()]
    if found.latents:  # other formats do not say
        facts += [(f"latents.{key}", value, getattr(wanted.latents, key, None)) for key, value in found.latents]
    told = ("sigma_data", "c_noise", *(["sigma_min"] if found.form in ("skip", "piecewise") else []))
    facts += [(f"noise.{key}", getattr(found.noise, key), getattr(wanted.noise, key)) for key in told]
    return facts + [("euler_steps", found.euler_steps, wanted.euler_steps)]
