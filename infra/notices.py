"""Check that a file of licences, as `make sbom` writes it, names every package of the lock files.

    python infra/notices.py NOTICES LOCK...

The tool that writes it passes over packages that are not installed.
"""

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def missing(notices: str, *locks: str) -> list[str]:
    """Return the packages of these lock files that the notices do not name, sorted."""
    named = {canonicalize_name(line.strip()) for line in notices.splitlines()}
    pins = [Requirement(pin) for lock in locks for pin in re.findall(r"^[\w.-]+==[^\\\n]+", lock, re.M)]
    here = {canonicalize_name(pin.name) for pin in pins if not pin.marker or pin.marker.evaluate()}
    return sorted(here - named)


if __name__ == "__main__":
    if left_out := missing(*(Path(name).read_text() for name in sys.argv[1:])):
        sys.exit(f"{sys.argv[1]}: no licence of {', '.join(left_out)}")
