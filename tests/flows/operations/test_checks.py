"""Checks before a run: what Prefect could not read is named, the server of a profile is asked."""

import os
import subprocess
import sys

import pytest

CHECK = """
from flows.operations.checks import check_before_a_run
try:
    check_before_a_run()
except Exception as error:
    print(type(error).__name__, error)
"""
SERVER = "from flows.commands import doctor; print(doctor._examine('Prefect', doctor._prefect)['says'])"


def output(home, code, **variables):
    """Return what a new process of a user with this home prints; Prefect reads its settings once."""
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env = {**theirs, "HOME": str(home), **variables}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


def write_profiles(home, text):
    (home / ".prefect").mkdir()
    (home / ".prefect" / "profiles.toml").write_text(text)


@pytest.mark.slow
def test_a_value_that_prefect_cannot_read_is_named_with_its_variable(tmp_path):
    said = output(tmp_path, CHECK, PREFECT_LOGGING_LEVEL="verbose")
    assert said.stdout.startswith("UserError PREFECT_LOGGING_LEVEL: level=VERBOSE: Input should be 'DEBUG'")
    assert said.stderr == ""


@pytest.mark.slow
def test_a_profile_that_is_broken_is_named_by_its_file(tmp_path):
    write_profiles(tmp_path, 'active = "default\n')
    said = output(tmp_path, CHECK)
    assert said.stdout.startswith(f"UserError {tmp_path}/.prefect/profiles.toml: Illegal character")


@pytest.mark.slow
def test_doctor_asks_the_server_of_the_profile(tmp_path):
    write_profiles(tmp_path, 'active = "team"\n\n[profiles.team]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n')
    said = output(tmp_path, SERVER).stdout
    assert said.startswith("PREFECT_API_URL=http://127.0.0.1:9/api: ") and "Connection refused" in said
