"""The lock files: complete, by hashes, without addresses, and for the image without what tests and lints need."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NAMES = ("requirements", "requirements-dev", "requirements-docs", "requirements-cuda")
PINNED = re.compile(r"([\w.-]+)==([^\s;]+)(?: ; .+)?")


def locked(name: str) -> dict[str, list[str]]:
    """Return {package: hashes}; every line that is no comment belongs to a package."""
    found: dict[str, list[str]] = {}
    text = (ROOT / f"{name}.lock").read_text().replace("\\\n", " ")
    for line in filter(None, (line for line in text.splitlines() if not line.startswith("#"))):
        pin, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
        match = PINNED.fullmatch(pin.strip())
        assert match, line
        found[canonicalize_name(match[1])] = hashes
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_package_has_hashes_and_no_file_an_address(name):
    for package, hashes in locked(name).items():
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", one.strip()) for one in hashes), package
    assert "://" not in (ROOT / f"{name}.lock").read_text()


def test_a_package_is_locked_once():
    names = [package for name in NAMES for package in locked(name)]
    assert len(names) == len(set(names)) > 250


def test_what_runs_and_what_tests_are_locked_apart():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]} - {"torch"}
    runs, tests = locked("requirements").keys(), locked("requirements-dev").keys()
    assert needed <= runs
    assert {"pytest", "ruff", "mypy", "moto", "playwright", "diffusers", "import-linter"} <= tests
    assert {"torch", "triton"} <= locked("requirements-cuda").keys()


def test_the_image_takes_only_what_it_runs_and_only_by_hashes():
    text = (ROOT / "infra" / "Dockerfile").read_text().replace("\\\n", " ")
    assert "requirements-dev" not in text
    for command in re.findall(r"pip install[^&;]*--requirement[^&;]*", text):
        assert "--require-hashes" in command and "--no-deps" in command, command
    assert text.count("--require-hashes") == 2
