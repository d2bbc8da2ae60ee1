"""Secrets of a workspace stay out of what is recorded: patches, parameters, tags, log lines."""

import logging

import pytest

from flows.storage.s3 import public_text
from flows.tracking.tracker import Tracker
from flows.workspace import clone, git
from miniature import commit, make_workspace
from miniature import git as run_git

ADDRESS = "https://user:hunter2@host.example/pets.zip?X-Amz-Signature=f00d&id=7"
PUBLIC = "https://host.example/pets.zip"


@pytest.fixture
def root(tmp_path):
    return make_workspace(tmp_path / "mini")


def test_the_recorded_patch_lacks_secrets_and_says_so(root, caplog):
    (root / "settings.py").write_text("harmless = 1\n")
    run_git(root, "add", "settings.py")
    commit(root)
    hidden = {
        ".env": "AWS_SECRET_ACCESS_KEY=hidden-1\n",
        "deploy/.env.local": "TOKEN=hidden-2\n",
        "id_ed25519": "hidden-3\n",
        "my credentials.json": '{"a": "hidden-4"}\n',
        "infra/secrets/s3": "hidden-5\n",
        "settings.py": 'harmless = 1\npassword = "hidden-6"\n',  # tracked
        "client.py": 'key = "AKIAIOSFODNN7HIDDEN7"\n',
        "notes.txt": "-----BEGIN OPENSSH PRIVATE KEY-----\nhidden-8\n",
        "push.py": 'login(token="hf_aHidden10aHidden10aHidden10aHidden10")\n',
        "up.sh": "export PREFECT_API_AUTH_STRING=cm:hidden-11-4f6a2b\n",
        "chat.py": 'ADDRESS = "https://chat.example/api/webhooks/123456789/hidden-12-hidden-12"\n',
        "data.yaml": "path: https://bucket.example/a.zip?X-Amz-Signature=hidden13f00d5eed77\n",
        "large.csv": "hidden-9," * 2**17,
    }
    for name, text in hidden.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "stage.py").write_text(f"{(root / 'stage.py').read_text()}\n# an honest edit\n")
    with caplog.at_level(logging.WARNING), clone.clone(root, "run") as copy:
        (patch,) = copy.edits().values()
        for name, text in hidden.items():
            assert (copy.root / name).read_text() == text, "the run has what the workspace has"
    recorded = patch.read_text()
    assert "+# an honest edit" in recorded and "hidden" not in recorded.lower()
    for name in hidden:
        assert f"# left out: {name}, " in recorded
        assert any(line.startswith(f"{name}: the record of the uncommitted edits lacks it") for line in caplog.messages)
    assert not [file for file in copy.folder.iterdir() if file.is_file() and b"hidden" in file.read_bytes()]
    run_git(root, "checkout", "--quiet", "stage.py", "settings.py")
    run_git(root, "apply", "--check", str(patch))


def test_what_this_repository_holds_is_no_secret():
    """Few files of code are left out in vain."""
    from miniature import REPOSITORY

    empty = run_git(REPOSITORY, "hash-object", "-t", "tree", "/dev/null").strip()
    patch = git.git(
        REPOSITORY, "diff", "--binary", empty, "HEAD", "--", "flows/data", "flows/stages", "cm_core/methods", "docs/adr"
    )
    recorded, left_out = git.without_secrets(patch)
    assert not left_out and recorded == patch


@pytest.mark.parametrize(
    "remote", ["https://user:hunter2@host.example/o/r.git", "https://host.example/o/r.git", "git@host.example:o/r.git"]
)
def test_the_page_of_the_code_holds_no_token(root, remote):
    run_git(root, "remote", "add", "origin", remote)
    page = git.describe_code(root)["git.url"]
    assert page.startswith("https://host.example/o/r/commit/")


def test_addresses_are_recorded_without_what_opens_them(root, monkeypatch, tmp_path):
    for name in ("CM_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    tracker = Tracker(tmp_path)
    run_id = tracker.client.create_run(tracker.experiment_id).info.run_id
    tracker.log_params(run_id, {"data.source.path": ADDRESS, "data.source.urls": [ADDRESS, ADDRESS], "seed": 1})
    tracker.end_run(run_id, ValueError(f"cannot read {ADDRESS}, sorry"))
    run = tracker.client.get_run(run_id)
    assert run.data.params == {
        "data.source.path": PUBLIC,
        "data.source.urls": f'["{PUBLIC}", "{PUBLIC}"]',
        "seed": "1",
    }
    assert run.data.tags["error"] == f"ValueError: cannot read {PUBLIC} sorry"
    assert b"hunter2" not in (tmp_path / "mlflow.db").read_bytes()


def test_what_a_stage_says_is_logged_without_secrets(root, caplog):
    with clone.clone(root, "run") as copy, caplog.at_level(logging.INFO):
        copy._run(["echo", f"cm: {ADDRESS} does not answer"], {}, lambda: None, logged=True)
    assert caplog.messages == [f"cm: {PUBLIC} does not answer"]
    assert public_text("postgresql://u:hunter2@db/cm, s3://b/k?x") == "postgresql://db/cm, s3://b/k?x"
