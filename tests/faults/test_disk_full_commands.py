"""A full disk under what commands write: one line, nothing half-written is taken for whole, with space it goes on."""

import shutil

import numpy as np
import pytest

from cm_core.model import load_model
from command import run
from disks import fill
from flows.commands.drawing import is_model
from image_sources import colours
from miniature import make_workspace, save_untrained

ROOM = 64 << 10  # bytes, less than a model has


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    save_untrained(folder, form="skip", image_shape=(1, 8, 8))
    return folder


def refused(capsys, *arguments):
    """Run a command that finds no space; return its one line."""
    code, _, error = run(capsys, *map(str, arguments))
    assert code == 2 and error.count("\n") == 1 and "No space left on device" in error, (code, error)
    return error


@pytest.mark.parametrize(
    "target, suffix", [("safetensors", ".safetensors"), ("torch-export", ".pt2"), ("onnx", ".onnx")]
)
def test_an_exported_file_is_whole_or_absent(disk, model, capsys, target, suffix):
    fill(disk.folder, ROOM)
    out = disk.folder / f"exported{suffix}"
    assert str(out) in refused(capsys, "export", model, "--to", target, "--out", out)
    assert sorted(path.name for path in disk.folder.iterdir()) == ["ballast"]
    disk.grow()
    assert run(capsys, "export", str(model), "--to", target, "--out", str(out))[0] == 0 and out.stat().st_size > ROOM


def test_an_imported_model_is_whole_or_none(disk, model, capsys):
    """Nor an earlier one with other weights or another origin, where one is replaced."""
    out = disk.folder / "imported"
    shutil.copytree(model, out)
    fill(disk.folder, ROOM)
    refused(capsys, "import", model, "--out", out)
    assert not is_model(str(out))
    disk.grow()
    assert run(capsys, "import", str(model), "--out", str(out))[0] == 0 and load_model(out)


@pytest.mark.parametrize("name", ["drawn.npy", "drawn", "drawn.png"])
def test_drawn_images_are_whole_or_absent(disk, model, capsys, name):
    """A folder of images with some missing looks like a whole one."""
    fill(disk.folder, 8 << 10)
    out = disk.folder / name
    refused(capsys, "sample", "--model", model, "--out", out, "--n", "400")
    assert not [path for path in disk.folder.rglob("*.*")]
    disk.grow()
    assert run(capsys, "sample", "--model", str(model), "--out", str(out), "--n", "400")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("full", ["data", "cache"])
def test_data_are_added_whole_or_not(disk, tmp_path, capsys, monkeypatch, full):
    monkeypatch.delenv("CM_HOME", raising=False)
    np.save(tmp_path / "images.npy", colours(2000, size=(32, 32)))
    root = make_workspace((disk.folder if full == "data" else tmp_path) / "workspace")
    cache = (tmp_path if full == "data" else disk.folder) / "cache"
    (root / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache}\n")
    monkeypatch.chdir(root)
    refused(capsys, "data", "add", tmp_path / "images.npy")
    assert not list((root / "data").rglob("*.dvc"))
    assert (root / "data" / "images.npy").exists() == (full == "cache")
    disk.grow()
    code, out, error = run(capsys, "data", "add", str(tmp_path / "images.npy"))
    assert code == 0 and "2000 images" in out, error
