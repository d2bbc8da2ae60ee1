"""The artifact of the stage `features` as later stages read it: feature network, weights, reference features."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flows.errors import UserError

FACTS_FILE, REFERENCE_FILE = "features.json", "reference_features.npy"


@dataclass(frozen=True)
class FeatureFiles:
    """A feature network and its features of the training images."""

    kind: str  # as the recipe names it
    extractor: str  # as torch-fidelity names it
    short_name: str  # in names of metrics: fid_<short name>
    weights: Path
    sha256: str  # of the weights
    accuracy: float | None  # of a trained classifier on held-out images
    reference_sha256: str  # of the pixels behind `reference`
    reference: np.ndarray  # float32 [N, D], memory-mapped


def write_feature_files(folder: Path, facts: dict[str, Any], reference: np.ndarray) -> None:
    """Write the reference features, then features.json, whose presence marks the folder complete."""
    np.save(folder / REFERENCE_FILE, reference)
    facts = facts | {"feature_dim": reference.shape[1], "reference_images": len(reference)}
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")


def load_feature_files(folder: Path) -> FeatureFiles:
    """Open the output of the stage `features`; raise UserError if there is none."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_text())
        reference = np.load(folder / REFERENCE_FILE, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no feature network here; the stage features writes it") from error
    return FeatureFiles(
        kind=facts["kind"],
        extractor=facts["extractor"],
        short_name=facts["short_name"],
        weights=folder / facts["weights"],
        sha256=facts["sha256"],
        accuracy=facts.get("accuracy"),
        reference_sha256=facts["reference_sha256"],
        reference=reference,
    )
