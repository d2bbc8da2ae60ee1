"""Local paths in a recipe: made absolute, and what they name recorded by its checksum."""

from functools import reduce
from pathlib import Path
from typing import Any

from flows.storage.fetch import is_local, local_path
from flows.storage.locate import checksum

PATH_KEYS = (  # values that may name a local file or folder
    "data.source.path",
    "data.source.heldout_path",
    "data.source.urls",
    "data.latents.autoencoder",
    "features.weights",
    "features.reference",
    "base.method.distance.weights",
    "student.method.distance.weights",
    "teacher.weights",
    "base.weights",
    "student.weights",
    "sample.weak_teacher.weights",
)
PINNED = (  # of these, whose checksum is recorded
    "data.latents.autoencoder",
    "teacher.weights",
    "base.weights",
    "student.weights",
    "sample.weak_teacher.weights",
)


def absolute_paths(tree: Any, base: Path | None) -> Any:
    """Make local paths absolute and expand `~`: a flow run works in a clone, far from `base`.

    A path with a .dvc file beside it stays: every clone can restore that file. Malformed values are left to `validate`.
    """
    for key in PATH_KEYS:
        *sections, name = key.split(".")
        section: Any = reduce(lambda at, part: at.get(part) if isinstance(at, dict) else None, sections, tree)
        if base and isinstance(section, dict) and section.get(name):
            section[name] = _absolute(section[name], base)
            if key in PINNED:
                _pin(section, name)
    return tree


def _pin(section: dict[str, Any], name: str) -> None:
    """Add the checksum of local weights: another file under the same path is another model, and not cached."""
    weights = section[name]
    unknown = not section.get("sha256") and isinstance(weights, str) and is_local(weights)
    if unknown and (path := local_path(weights)).exists():
        section["sha256"] = checksum(path)


def _absolute(path: Any, base: Path) -> Any:
    if isinstance(path, list):
        return [_absolute(one, base) for one in path]
    if not isinstance(path, str) or ":/" in path or (base / f"{path}.dvc").is_file():
        return path
    return str(base / Path(path).expanduser())
