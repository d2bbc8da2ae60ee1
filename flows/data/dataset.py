"""The prepared data set as later stages read it: memory-mapped pixels, labels, metadata."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.errors import UserError

if TYPE_CHECKING:
    from cm_core.latents import Latents

FACTS = {"name", "image_shape", "num_classes", "class_names", "sha256"}  # required keys of dataset.json


@dataclass(frozen=True)
class Dataset:
    """Both splits of a prepared data set; images are uint8 [N, H, W, C], labels int64 [N] (-1: no label)."""

    name: str
    image_shape: tuple[int, int, int]  # [C, H, W]
    num_classes: int  # 0: unlabelled
    class_names: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    heldout_images: np.ndarray
    heldout_labels: np.ndarray
    sha256: dict[str, str]  # of the pixels, by split: "train", "heldout"
    resize: str = "none"  # how images got their shape, as data.resize
    latents: "Latents | None" = None  # None: networks see the pixels
    moments: dict[str, np.ndarray] = field(default_factory=dict)  # latents by split, float32 [N, 2, C, h, w]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what networks see."""
        return self.moments["train"].shape[2:] if self.latents else self.image_shape

    def facts(self, conditional: bool) -> dict[str, Any]:
        """Return what a model's spec says of its data."""
        classes = self.num_classes if conditional else 0
        return {"image_shape": self.input_shape, "latents": self.latents, "num_classes": classes}

    def inputs(self, split: str) -> np.ndarray:
        """Return what networks see of a split, for `cm_core.tensors.to_inputs`: its latents, else its images."""
        return self.moments[split] if self.latents else getattr(self, f"{split}_images")


def load_dataset(prepare_dir: Path) -> Dataset:
    """Open the output of the stage `prepare`, images memory-mapped; raise UserError if it is missing or incomplete."""
    facts = _read_facts(prepare_dir / "dataset.json")
    arrays = {
        f"{split}_{part}": _open_array(prepare_dir / f"{split}_{part}.npy")
        for split in ("train", "heldout")
        for part in ("images", "labels")
    }
    latents, moments = None, {}
    if facts.get("latents"):
        from cm_core.latents import Latents

        latents = Latents.model_validate(facts["latents"])
        moments = {split: _open_array(prepare_dir / f"{split}_latents.npy") for split in ("train", "heldout")}
    return Dataset(
        name=facts["name"],
        image_shape=tuple(facts["image_shape"]),
        num_classes=facts["num_classes"],
        class_names=tuple(facts["class_names"]),
        sha256=facts["sha256"],
        resize=facts.get("resize", "none"),
        latents=latents,
        moments=moments,
        **arrays,
    )


def _read_facts(path: Path) -> dict:
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no prepared data here; the stage prepare writes it") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the stage prepare again") from None
    if missing := FACTS - facts.keys():
        raise UserError(f"{path}: lacks {', '.join(sorted(missing))}; run the stage prepare again")
    return facts


def _open_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot read the prepared array ({error}); run the stage prepare again") from None
