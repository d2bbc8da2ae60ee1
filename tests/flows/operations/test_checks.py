"""Checks before a run: what Prefect could not read is named, the server of a profile is asked."""

import os
import subprocess
import sys

import pytest

from flows.errors import UserError
from flows.operations.checks import BEFORE_A_RUN

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
def test_a_home_of_prefect_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    said = output(tmp_path, CHECK, PREFECT_HOME=str(tmp_path / "file" / "home"))
    assert said.stdout == f"UserError PREFECT_HOME={tmp_path}/file/home: cannot be written (Not a directory)\n"
    assert said.stderr == ""


@pytest.mark.slow
def test_prefect_shows_no_traceback_of_a_fault_that_another_check_names(tmp_path):
    said = output(
        tmp_path,
        "from flows.operations.checks import BEFORE_A_RUN; BEFORE_A_RUN['Prefect settings']()",
        SSL_CERT_FILE="/nowhere.pem",
    )
    assert "Traceback" not in said.stderr


def test_settings_of_dvc_that_it_cannot_read_are_named_by_their_file(tmp_path, monkeypatch):
    check = BEFORE_A_RUN["DVC settings"]
    monkeypatch.setenv("DVC_SYSTEM_CONFIG_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path))
    assert check() == "those of the workspace alone"
    (tmp_path / "config").write_text("[core]\n    autostage = true\n")
    assert check() == f"{tmp_path}/config"
    for text in ("[[[core", "[core]\n    autostage = perhaps\n", "[nonsense]\n    a = b\n"):
        (tmp_path / "config").write_text(text)
        with pytest.raises(UserError, match=f"^{tmp_path}/config: [^\n]+$"):
            check()


@pytest.mark.slow
def test_doctor_asks_the_server_of_the_profile(tmp_path):
    write_profiles(tmp_path, 'active = "team"\n\n[profiles.team]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n')
    said = output(tmp_path, SERVER).stdout
    assert said.startswith("PREFECT_API_URL=http://127.0.0.1:9/api: ") and "Connection refused" in said
