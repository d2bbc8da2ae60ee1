"""Divide the packages of .venv: what the project needs to run, and what its tests and lints need besides.

    python infra/lock.py FREEZE RUNTIME DEV

FREEZE is what `pip freeze` prints. Both lists get lines of it; `make lock` adds the hashes.
"""

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Of packages here, on a Python that is not the one of .venv: redis, for Debian 12's 3.11.2.
OTHER_PYTHONS = ("async-timeout==5.0.1 ; python_full_version < '3.11.3'",)
INSTALLERS = ("pip", "setuptools", "nvidia-ml-py")  # and what reads a GPU; nothing depends on them


def closure(needed: Iterable[str], known: set[str]) -> set[str]:
    """Return the names of all packages that requirements need, as far as `known` has them."""
    found: set[tuple[str, str]] = set()
    pending = [(Requirement(text), "") for text in needed]
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name in known and (name, extra) not in found:
                found.add((name, extra))
                pending += [(Requirement(text), extra) for text in distribution(name).requires or ()]
    return {name for name, _ in found}


def main(freeze: str, runtime: str, dev: str) -> None:
    """Write both lists."""
    lines = {canonicalize_name(line.partition("==")[0]): line for line in Path(freeze).read_text().split()}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    runs = closure([*needed, *INSTALLERS], {*lines, "torch"})  # torch is locked apart, its needs are not
    for path, chosen, others in ((runtime, lines.keys() & runs, OTHER_PYTHONS), (dev, lines.keys() - runs, ())):
        Path(path).write_text("\n".join([*(lines[name] for name in sorted(chosen)), *others, ""]))


if __name__ == "__main__":
    main(*sys.argv[1:])
