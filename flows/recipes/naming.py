"""Names of runs: the recipe file's, and what differs from it."""

import shlex
from functools import lru_cache
from pathlib import Path

from cm_core.params import Params
from flows.recipes.files import RECIPES_DIR, find_file, run_name
from flows.recipes.recipe import (
    EDITED,
    Recipe,
    flatten,
    load_active,
    load_recipe,
    recipe_names,
    recorded_name,
    yaml_text,
)
from flows.stages.student import Student
from flows.stages.teacher import Teacher

OPTIONAL: dict[str, type[Params]] = {"teacher": Teacher, "base": Student}  # sections that may be null


def called(recipe: Recipe, name: str, root: Path) -> str:
    """Return the name of a run: that of the recipe file, and what differs from it."""
    if name not in recipe_names(root):
        return name
    return run_name(name, overrides(recipe, name, root))


def overrides(recipe: Recipe, name: str, root: Path) -> list[str]:
    """Return what differs from the recipe file of this name, key=value.

    A section of another kind than the file's has started afresh: of it, the kind is named and what is not its default.
    """
    known = _values_in_file(name, root, find_file(name, root / RECIPES_DIR).stat().st_mtime_ns)
    differs = {key: value for key, value in _values(recipe).items() if value not in [one.get(key) for one in known]}
    kinds = [key for key in differs if key.endswith(".kind")]
    default = differs.keys() - flatten(recipe.model_dump(mode="json", exclude_defaults=True)).keys()
    unsaid = {key for key in default for kind in kinds if key != kind and key.startswith(kind.removesuffix("kind"))}
    said = [f"{key}={value}" for key, value in differs.items() if key not in unsaid]
    added = [role for role in OPTIONAL if getattr(recipe, role) is not None and known[0].get(role) == "null"]
    return said + [f"{role}={{}}" for role in added if not any(one.startswith(f"{role}.") for one in said)]


def command(recipe: Recipe, name: str, root: Path) -> str | None:
    """Return the command that runs a recipe again, `name` as `called` returns it; None without its file."""
    file = name.split()[0]
    if file not in recipe_names(root):
        return None
    settings = [f"--set {shlex.quote(override)}" for override in overrides(recipe, file, root)]
    return " \\\n    ".join([f"cm run {file}", *settings])


@lru_cache(maxsize=8)
def _values_in_file(name: str, root: Path, modified: int) -> list[dict[str, str]]:
    """Return the values of a recipe file, its paths as they are written and absolute; `modified` outdates the cache.

    A flow asks twice, and a local checkpoint that the file names is hashed to be compared.
    """
    found = [_values(load_recipe(name, root=root, base=base)) for base in (None, root)]
    return [_defaults_of_absent(values) | values for values in found]


def _defaults_of_absent(values: dict[str, str]) -> dict[str, str]:
    """Return the values with which sections begin that the file has as null."""
    absent = {role: section for role, section in OPTIONAL.items() if values.get(role) == "null"}
    trees = {role: section().model_dump(mode="json") for role, section in absent.items()}
    return {key: yaml_text(value) for key, value in flatten(trees).items()}


def _values(recipe: Recipe) -> dict[str, str]:
    return {key: yaml_text(value) for key, value in flatten(recipe.model_dump(mode="json")).items()}


def title(recipe: Recipe, name: str) -> str:
    """Return a readable run name such as `digits-cd · cd heun N=18`, or `digits-tcm · ect then tcm`."""
    method, before = recipe.student.method, [] if recipe.base is None else [recipe.base.method.kind, "then"]
    labels = {"solver": "{}", "num_scales": "N={}", "s0": "s0={}", "s1": "s1={}"}
    chosen = {field: getattr(method, field, None) for field in labels}
    words = [label.format(chosen[field]) for field, label in labels.items() if chosen[field] is not None]
    return " ".join(([f"{name} ·"] if name else []) + [*before, method.kind, *words])


def active_name(root: Path) -> str:
    """Return the name of the active recipe; if its values have changed since, with what differs from the file's."""
    name, unchanged = recorded_name(root)
    if unchanged:
        return name
    file = name.split()[0]
    return called(load_active(root), file, root) if file in recipe_names(root) else EDITED
