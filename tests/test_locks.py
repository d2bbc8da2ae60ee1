"""The lock files: complete, by hashes, without addresses, and for the image without what tests and lints need."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NAMES = tuple(sorted(path.stem for path in ROOT.glob("*.lock")))
IMAGE = ("requirements", "requirements-cuda", "requirements-integrations")
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
    assert {"prefect-docker", "prefect-kubernetes"} <= locked("requirements-integrations").keys()


def test_the_image_takes_only_what_it_runs_and_only_by_hashes():
    text = (ROOT / "infra" / "Dockerfile").read_text().replace("\\\n", " ")
    installed = []
    for command in re.findall(r"pip install[^&;\n]*", text):
        known = re.search(r"--requirement (\S+)\.lock", command)
        installed += [known[1]] if known else []
        exempt = command.split()[-1] in ("${TORCH}", ".")  # a build that the caller names, this project
        assert exempt or (known and "--require-hashes" in command and "--no-deps" in command), command
    assert sorted(installed) == sorted(IMAGE)


def test_vulnerabilities_and_licences_are_of_all_that_an_image_can_hold():
    makefile = (ROOT / "Makefile").read_text()
    (locks,) = re.findall(r"^LOCKS := ([^#]*)", makefile, re.M)
    assert locks.split() == [f"{name}.lock" for name in IMAGE]
    assert makefile.count("$(LOCKS)") == 4, "audit, SBOM, notices and their check"


def test_a_package_without_a_licence_is_named(tmp_path):
    notices, lock = tmp_path / "NOTICES.txt", tmp_path / "some.lock"
    hashes = " \\\n    --hash=sha256:" + "0" * 64 + "\n"
    lock.write_text(f"nvidia-cublas==13.1{hashes}typing-extensions==4.1{hashes}")
    lock.write_text(f"{lock.read_text()}async-timeout==5.0.1 ; python_full_version < '3.0'{hashes}")
    check = [sys.executable, ROOT / "infra" / "notices.py", notices, lock]
    notices.write_text("typing_extensions\n4.1\nPSF\n\n")
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"{notices}: no licence of nvidia-cublas\n")
    notices.write_text(f"{notices.read_text()}nvidia-cublas\n")
    assert subprocess.run(check, check=False).returncode == 0
