"""Recipe and sweep files as they lie in a workspace; nothing heavy is imported to list them."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

from flows.errors import UserError, did_you_mean

RECIPES_DIR, SWEEPS_DIR = Path("params/recipes"), Path("params/sweeps")
MAX_NAME = 120  # characters of a run's name, however many overrides it has


def names_in(folder: Path) -> list[str]:
    """Return the names of the YAML files in a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_file(name: str, folder: Path) -> Path:
    """Return the YAML file of a name in a folder such as params/recipes; a path to any .yaml file is taken as it is."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path, kind = folder / f"{name}.yaml", folder.name.removesuffix("s")
    if not path.exists():
        names = names_in(folder)
        guess = did_you_mean(name, names)
        raise UserError(f"no {kind} {name!r}{guess}; there are {', '.join(names)}, or give a path to a .yaml file")
    return path


def run_name(recipe: str, overrides: Sequence[str]) -> str:
    """Return the name of a recipe with its overrides, MAX_NAME characters at most."""
    return textwrap.shorten(" ".join([Path(recipe).stem, *overrides]), MAX_NAME, placeholder=" ...")


def heading(path: Path) -> str:
    """Return the text of the comment that heads a file."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line.lstrip("#").strip() for line in lines)


def first_comment(path: Path) -> str:
    """Return the first line of the comment that heads a file."""
    return heading(path).partition("\n")[0]
