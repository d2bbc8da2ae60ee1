"""Images of one's own as versioned data: packed, described, found again in any clone by their version."""

import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from command import run
from flows.commands.data import describe
from flows.data.check import check_source
from flows.data.sources.digits import Digits
from flows.data.sources.image_files import Images
from flows.errors import UserError
from flows.recipes.recipe import load_recipe
from flows.workspace import clone
from flows.workspace.data_versions import fetch_versioned
from miniature import REPOSITORY, commit, git, make_workspace

RECIPE = "teacher: null\nstudent: {method: {kind: ct}}\n"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.delenv("CM_HOME", raising=False)
    root = make_workspace(tmp_path / "workspace")
    (root / "params" / "recipes").mkdir()
    (root / "params" / "recipes" / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def pictures(tmp_path):
    """Two classes of three noisy images, and a stray file."""
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    (tmp_path / "pictures" / "README.txt").write_text("not an image")
    return tmp_path / "pictures"


def test_what_cannot_be_added_is_refused_before_anything_is_written(root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        (["add"], "expected a PATH"),
        (["add", str(tmp_path / "none")], "no such file or folder"),
        (["add", str(tmp_path / "empty")], "no images"),
        (["add", str(tmp_path / "empty"), "--name", "../x"], "letters, digits"),
    ):
        code, _, err = run(capsys, "data", *arguments)
        assert code == 2 and says in err
    assert not (root / "data").exists()
    assert "No versioned data yet" in run(capsys, "data")[1]


def test_images_are_decoded_before_they_are_versioned(root, pictures, capsys):
    for name in ("cats/0.png", "dogs/1.png"):
        (pictures / name).write_bytes((pictures / name).read_bytes()[:60])
    code, _, err = run(capsys, "data", "add", str(pictures))
    assert code == 2 and err.count("\n") == 1 and not (root / "data").exists()
    assert "2 of 6 images cannot be used" in err and "cats/0.png: damaged" in err and "dogs/1.png: damaged" in err
    kind, facts = describe(pictures, "keep")
    assert (kind, facts["images"], facts["unusable"]) == ("images", 6, 2)


def test_a_run_and_the_doctor_tell_what_is_wrong_with_the_images_at_once(root, pictures, capsys):
    (pictures / "test").mkdir()
    (pictures / "cats" / "0.png").rename(pictures / "test" / "0.png")
    for path, part in (
        (pictures, "named like splits of the data: test, beside cats, dogs"),
        (root / "none", "no such"),
    ):
        code, _, err = run(capsys, "run", "tiny", "--set", f"data.source={{kind: images, path: {path}}}")
        assert code == 2 and part in err and err.count("\n") == 1
        with pytest.raises(UserError, match=part):
            check_source(Images(path=str(path)), root)
    assert not list(root.glob(".cm/runs/*"))
    listed = check_source(Images(path=str(pictures), splits="none"), root)
    assert listed == f"{pictures}: 6 images, 3 classes, 1 other files"
    assert check_source(Digits(), root) == "digits"


@pytest.mark.slow
def test_a_folder_becomes_one_versioned_archive_that_every_clone_finds(root, pictures, capsys, caplog):
    code, out, _ = run(capsys, "data", "add", str(pictures), "--description", "pets of the house")
    assert code == 0 and "6 images, 2 classes, 1 ignored files" in out
    version = re.search(r"version ([0-9a-f]{32})", out)[1]
    override = re.search(r"--set '(.*)'", out)[1]
    recipe = load_recipe("tiny", [override], root=root, base=root)
    assert (recipe.data.source.path, recipe.data.source.version) == ("data/pictures.zip", version)
    git(root, "add", "--all")
    commit(root)
    (listed,) = json.loads(run(capsys, "data", "--json")[1])
    assert listed["version"] == version and listed["description"] == "pets of the house" and len(listed["commits"]) == 1

    caplog.set_level(logging.INFO, "flows")
    with clone.clone(root, "run") as copy:
        assert not (copy.root / "data" / "pictures.zip").exists()
        assert fetch_versioned(copy.root, "data/pictures.zip", version) == {"data/pictures.zip": version}
        assert (copy.root / "data/pictures.zip").read_bytes() == (root / "data/pictures.zip").read_bytes()
        with pytest.raises(UserError, match=f"at version {version}, data.source.version='other'"):
            fetch_versioned(copy.root, "data/pictures.zip", "other")
    assert f"prepare: data/pictures.zip, version {version}" in caplog.messages
    assert fetch_versioned(root, "/elsewhere/pictures.zip", "") == {}


@pytest.mark.slow
def test_data_travel_between_two_clones_and_equal_images_are_one_version(root, pictures, tmp_path, capsys):
    remote = tmp_path / "remote"
    text = f"[core]\n    remote = team\n['remote \"team\"']\n    url = {remote}\n"
    (root / ".dvc" / "config.local").write_text(text)
    out = run(capsys, "data", "add", str(pictures))[1]
    assert f"pushed to {remote}" in out
    version = re.search(r"version ([0-9a-f]{32})", out)[1]
    git(root, "add", "--all")
    commit(root)
    git(tmp_path, "clone", "--quiet", str(root), "other")
    (tmp_path / "other" / ".dvc" / "config.local").write_text(text)
    assert fetch_versioned(tmp_path / "other", "data/pictures.zip", version)
    assert (tmp_path / "other/data/pictures.zip").read_bytes() == (root / "data/pictures.zip").read_bytes()
    for path in pictures.rglob("*"):
        path.touch()
    assert version in run(capsys, "data", "add", str(pictures), "--name", "again")[1]


@pytest.mark.slow
def test_an_array_is_versioned_and_prepared_through_dvc(root, tmp_path, capsys):
    """The stage asks DVC for its data while DVC runs the stage."""
    images = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", images=images)
    out = run(capsys, "data", "add", str(tmp_path / "grey.npz"))[1]
    version = re.search(r"version ([0-9a-f]{32})", out)[1]
    (root / "data" / "grey.npz").unlink()
    code = f"""
import logging
from pathlib import Path
from flows.workspace.data_versions import fetch_versioned
logging.basicConfig(level="INFO")
fetch_versioned(Path.cwd(), "data/grey.npz", {version!r})
Path("out/prepare").mkdir(parents=True)
Path("out/prepare/copy").write_bytes(Path("data/grey.npz").read_bytes())
"""
    (root / "fetch.py").write_text(code)
    stage = f"stages:\n  prepare:\n    cmd: {sys.executable} fetch.py\n    deps: [fetch.py]\n    outs: [out/prepare]\n"
    (root / "dvc.yaml").write_text(stage)
    command, env = [sys.executable, "-m", "dvc", "repro"], {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"data/grey.npz, version {version}" in done.stderr
    assert np.array_equal(np.load(root / "out/prepare/copy")["images"], images)
