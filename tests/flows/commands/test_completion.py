"""Completion scripts in real shells: what a press of Tab offers, in a workspace and below it."""

import shutil
import subprocess
import sys

import pytest

from command import run
from miniature import REPOSITORY

PRESS = (  # what bash calls when Tab is pressed after the words "$@"
    'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
    '_shtab_cm cm "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"; echo "${COMPREPLY[@]}"'
)


@pytest.fixture
def script(tmp_path, capsys):
    """Return the file with a shell's script."""

    def write(shell):
        code, out, _ = run(capsys, "--print-completion", shell)
        assert code == 0
        (tmp_path / shell).write_text(out)
        return tmp_path / shell

    return write


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_one_that_the_shell_can_read(shell, script):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    done = subprocess.run([shell, "-n", script(shell)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ru"], {"run", "runs"}),
        (["run", "digits-c"], {"digits-cd", "digits-cmt", "digits-ct"}),
        (["sweep", "digits-m"], {"digits-methods"}),
        (["stage", "t"], {"teacher"}),
        (["runs", "compare", "digits-cd", "ch"], {"champion"}),
        (["run", "digits-cd", "--take"], {"--take-over"}),
        (["plan", "digits-cd", "--gpu", "h"], {"h100", "h200"}),
    ],
)
@pytest.mark.parametrize("folder", [".", "docs"])
def test_tab_offers_commands_pages_and_options(words, offered, folder, script):
    command = ["bash", "-c", PRESS, "bash", script("bash"), "cm", *words]
    done = subprocess.run(command, cwd=REPOSITORY / folder, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


def test_outside_a_workspace_nothing_is_offered_and_nothing_said(tmp_path, script):
    command = ["bash", "-c", PRESS, "bash", script("bash"), "cm", "run", "digits-"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_commands_start_without_shtab():
    code = "import sys, flows.cli; flows.cli.build_parser(); print('shtab' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_the_version_is_the_packages(capsys):
    assert run(capsys, "--version") == (0, "cm 0.1.0\n", "")
