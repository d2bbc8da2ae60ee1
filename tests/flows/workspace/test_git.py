"""Workspaces of other users, hostile configurations of git, and every letter that a path may hold."""

import os
import shutil

import pytest

from flows.errors import UserError
from flows.tracking.tracker import Tracker
from flows.workspace import clone
from flows.workspace.git import git as run_git
from flows.workspace.locations import workspace_root
from miniature import git, make_workspace

HOSTILE = """
[core]
    hooksPath = {hooks}
    fsmonitor = /bin/false
[commit]
    gpgSign = true
[diff]
    external = /bin/false
    noprefix = true
[apply]
    whitespace = error
[protocol "file"]
    allow = never
[status]
    showUntrackedFiles = no
[init]
    templateDir = /nowhere
[color]
    ui = always
"""
LETTERS = "näsTy İı '\"`$x #1 %41;&!*~日"


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Return a function that gives git a global configuration."""

    def configure(text):
        (tmp_path / "gitconfig").write_text(text)
        monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))

    return configure


def test_a_clone_does_not_depend_on_what_a_user_configured(tmp_path, configured):
    root = make_workspace(tmp_path / "workspace")
    (root / "stage.py").write_text("edited  \n\n")
    (root / "new.txt").write_text("new")
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "post-checkout").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "hooks" / "post-checkout").chmod(0o755)
    configured(HOSTILE.format(hooks=tmp_path / "hooks"))
    with clone.clone(root, "run") as copy:
        assert (copy.root / "stage.py").read_text() == "edited  \n\n"
        assert (copy.root / "new.txt").read_text() == "new"


def test_a_broken_configuration_of_git_is_named_without_advice_on_the_workspace(tmp_path, configured):
    root = make_workspace(tmp_path / "workspace")
    configured("[user\n")
    for refused in (lambda: clone.clone(root, "run"), lambda: run_git(root, "--version")):
        with pytest.raises(UserError, match=f"git .*failed: fatal: bad config line 1 in file {tmp_path}/gitconfig$"):
            refused()


@pytest.mark.parametrize("ends", ["true", "input", "false"])
def test_a_clone_has_the_bytes_of_the_workspace(tmp_path, ends):
    """Hashes of code are over bytes: with other line ends nothing would be known."""
    make_workspace(tmp_path / "origin")
    git(tmp_path, "clone", "--quiet", "--config", f"core.autocrlf={ends}", "origin", "workspace")
    root = tmp_path / "workspace"
    (root / "params" / "active.yaml").write_bytes((root / "params" / "active.yaml").read_bytes() + b"more: 1\n")
    with clone.clone(root, "run") as copy:
        assert (b"\r\n" in (root / "stage.py").read_bytes()) == (ends == "true")
        assert (copy.root / "stage.py").read_bytes() == (root / "stage.py").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder away")
def test_for_a_workspace_of_another_user_gits_own_words_and_cure_suffice(tmp_path, configured):
    root = make_workspace(tmp_path / "workspace")
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            shutil.chown(path, 1234)
    configured("")
    with pytest.raises(UserError, match="dubious ownership") as refused:
        clone.clone(root, "run")
    assert f"git config --global --add safe.directory {root}" in str(refused.value)
    assert "make it" not in str(refused.value)
    configured(f"[safe]\n    directory = {root}\n")
    with clone.clone(root, "run") as copy:
        assert copy.reproduce("prepare").cached is False


def test_every_letter_may_stand_in_the_path_of_a_workspace(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = make_workspace(tmp_path / LETTERS)
    assert workspace_root(root) == root
    (root / ".dvc" / "config.local").write_text(f'[cache]\n    dir = """{tmp_path}/käche #2"""\n')
    tracker = Tracker(root)
    run_id = tracker.start_run("x", {}, command="x", parent_run_id=None)
    tracker.log_files(run_id, {"a/file.txt": root / "stage.py"})
    assert tracker.client.list_artifacts(run_id, "a")[0].path == "a/file.txt"
    assert (root / "mlflow.db").is_file() and list((root / "mlruns").rglob("file.txt"))
    with clone.clone(root, LETTERS) as copy:
        assert copy.reproduce("prepare").cached is False and copy.reproduce("prepare").cached is True
    assert list((tmp_path / "käche #2").rglob("*.dir"))


@pytest.mark.parametrize("letter", ["?", ":", "\n", "%(", "{{", "\udcff"])
def test_a_path_that_no_address_can_hold_is_refused(tmp_path, letter):
    root = tmp_path / f"a{letter}b"
    (root / "params").mkdir(parents=True)
    (root / "dvc.yaml").write_text("")
    with pytest.raises(UserError, match="in the path of a workspace; rename the folder"):
        workspace_root(root)
