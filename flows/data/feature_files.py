"""The artifact of the stage `features` as later stages read it: feature network, weights, reference."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.errors import UserError

if TYPE_CHECKING:
    from cm_core.metrics.evaluation import Reference, Statistics

FACTS_FILE, STATISTICS_FILE, KEPT_FILE = "features.json", "reference.npz", "reference_features.npy"


@dataclass(frozen=True)
class FeatureFiles:
    """A feature network, and what it makes of the reference images."""

    kind: str  # as the recipe names it
    extractor: str  # as torch-fidelity names it
    short_name: str  # in names of metrics: fid_<short name>
    weights: Path
    sha256: str  # of the weights
    accuracy: float | None  # of a trained classifier on held-out images
    data_sha256: str  # of the training images' pixels
    described: dict[str, Any]  # the reference in words, and its checksum
    reference: "Reference"


def write_feature_files(folder: Path, facts: dict[str, Any], reference: "Reference") -> None:
    """Write the reference, then features.json, whose presence marks the folder complete."""
    np.savez(folder / STATISTICS_FILE, **reference.statistics._asdict())
    if reference.features is not None:
        np.save(folder / KEPT_FILE, reference.features.numpy())
    facts = facts | {"feature_dim": len(reference.statistics.mu)}
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")


def load_feature_files(folder: Path) -> FeatureFiles:
    """Open the output of the stage `features`; raise UserError if there is none."""
    try:
        facts = json.loads((folder / FACTS_FILE).read_text())
        reference = _read_reference(folder)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no feature network here; the stage features writes it") from error
    return FeatureFiles(
        kind=facts["kind"],
        extractor=facts["extractor"],
        short_name=facts["short_name"],
        weights=folder / facts["weights"],
        sha256=facts["sha256"],
        accuracy=facts.get("accuracy"),
        data_sha256=facts["data_sha256"],
        described=facts["reference"],
        reference=reference,
    )


def _read_reference(folder: Path) -> "Reference":
    import torch

    from cm_core.metrics.evaluation import Reference

    kept = folder / KEPT_FILE
    features = torch.from_numpy(np.load(kept, allow_pickle=False)) if kept.exists() else None
    return Reference(read_statistics(folder / STATISTICS_FILE), features)


def read_statistics(path: Path) -> "Statistics":
    """Read published statistics, an .npz with mu [D] and sigma [D, D]; raise ValueError if the file holds none."""
    import zipfile

    from cm_core.metrics.evaluation import Statistics

    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = Statistics(*(arrays[name].astype(np.float64) for name in Statistics._fields))
    except (KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"no .npz file of the arrays mu and sigma ({error})") from error
    if found.mu.ndim != 1 or found.sigma.shape != 2 * found.mu.shape:
        raise ValueError(f"mu is {list(found.mu.shape)} and sigma {list(found.sigma.shape)}, not [D] and [D, D]")
    if not (np.isfinite(found.mu).all() and np.isfinite(found.sigma).all()):
        raise ValueError("mu or sigma holds values that are not finite")
    return found
