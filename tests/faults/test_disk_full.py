"""A full disk, for every writer: one clear line, nothing half-written is taken for whole, with space it goes on.

The disk is a file system in memory of a few megabytes, mounted by the test.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cm_core.checkpoint import list_states, load_state, save_state
from disks import fill
from flows.data.dataset import load_dataset
from flows.data.new_array import new_array
from flows.errors import UserError, is_disk_full
from flows.monitor import Monitor
from flows.recipes.recipe import Recipe
from flows.stages.prepare import prepare
from flows.storage.fetch import fetch
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.tracker import MODEL_FILES, Tracker, fetch_student
from flows.workspace import clone
from flows.workspace.dvc_files import Cache, file_md5, locked_outs
from image_sources import colours
from live import environment
from miniature import commit, make_workspace, save_untrained
from s3_states import URI, Worker, save, steps
from servers import http_server, s3_server

MB = 2**20


def test_the_command_says_it_in_one_line(disk):
    (disk.folder / "params").mkdir()
    (disk.folder / "dvc.yaml").write_text("stages: {}\n")
    fill(disk.folder)
    command = [sys.executable, "-m", "flows.cli", "use", "digits-cd"]
    (disk.folder / "params/recipes").mkdir()
    recipe = disk.folder / "params/recipes/digits-cd.yaml"
    recipe.symlink_to(os.path.abspath("params/recipes/digits-cd.yaml"))
    done = subprocess.run(
        command, cwd=disk.folder, env=environment(os.getcwd()), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr and f"{disk.folder} has 0.00 GB left" in done.stderr


def test_a_training_state_is_whole_or_absent(disk):
    save_state(disk.folder, 1, {"weights": torch.ones(MB // 4)}, {})
    with pytest.raises(Exception) as refused:
        save_state(disk.folder, 2, {"weights": torch.ones(MB)}, {})
    assert is_disk_full(refused.value)
    (state,) = list_states(disk.folder)
    assert state.name == "step-000000001" and load_state(state)[0]["weights"].sum() == MB // 4
    disk.grow()
    save_state(disk.folder, 2, {"weights": torch.ones(MB)}, {})
    assert len(list_states(disk.folder)) == 2


@pytest.mark.slow
def test_a_state_from_the_bucket_is_not_taken_half(disk, monkeypatch, tmp_path):
    with s3_server(monkeypatch, "states"):
        monkeypatch.setenv("CM_STATE", URI)
        with Worker(tmp_path / "first").hold() as held:
            save(held.folder, 1, size=6 * MB)
        with pytest.raises(UserError, match="No space left on device"), Worker(disk.folder).hold():
            pass
        disk.grow()
        with Worker(disk.folder).hold() as held:
            assert steps(held.folder) == [1]


def test_a_download_is_whole_or_absent(disk, monkeypatch):
    body = bytes(range(256)) * (24 * MB // 1024)
    with http_server({"/images.npz": (200, {}, body)}) as (url, _):
        with pytest.raises(UserError, match="images.npz: .*No space left on device") as refused:
            fetch(f"{url}/images.npz", disk.folder)
        assert str(refused.value).count("\n") == 0 and not list(disk.folder.rglob("*.npz"))
        disk.grow()
        assert fetch(f"{url}/images.npz", disk.folder).read_bytes() == body


def test_a_data_set_is_whole_or_refused(disk, tmp_path):
    np.save(tmp_path / "images.npy", colours(3000, size=(32, 32)))
    data = Recipe.model_validate({"data": {"source": {"kind": "array", "path": str(tmp_path / "images.npy")}}}).data
    out = disk.folder / "prepare"
    out.mkdir()
    with pytest.raises(UserError, match="the prepared images need 8 MiB, 4 MiB are free"):
        prepare(data, out, Monitor())
    with pytest.raises(UserError, match=r"dataset\.json: no prepared data here"):
        load_dataset(out)


def test_space_for_images_is_taken_before_the_first_is_drawn(disk):
    """A map of a file with holes would end the process by SIGBUS, without a word."""
    with pytest.raises(OSError, match="No space left on device"):
        new_array(disk.folder / "samples.npy", (6 * MB,))
    disk.grow()
    new_array(disk.folder / "samples.npy", (6 * MB,))[:] = 1


RESULT = 'if name == "teacher":\n    (out / "ema.safetensors").write_bytes(os.urandom(6 << 20))\n'


@pytest.mark.slow
@pytest.mark.parametrize("full", ["cache", "workspace"])
def test_a_result_is_stored_whole_or_not(disk, full, tmp_path, monkeypatch):
    for name in ("CM_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    root = make_workspace(tmp_path / "workspace")
    with (root / "stage.py").open("a") as script:
        script.write(RESULT)
    commit(root)
    if full == "cache":
        (root / ".dvc/config.local").write_text(f"[cache]\n    dir = {disk.folder}/cache\n")
    else:
        (root / ".cm").symlink_to(disk.folder)
    with clone.clone(root, "full") as run:
        run.reproduce("prepare")
        with pytest.raises(UserError, match="No space left on device") as refused:
            run.reproduce("teacher")
    assert str(refused.value).count("\n") == 0
    cache = Cache(disk.folder / "cache" if full == "cache" else root / ".dvc/cache")
    assert all(file_md5(file) == (file.parent.name + file.name).removesuffix(".dir") for file in cache.objects())
    disk.grow()
    with clone.clone(root, "again") as run:
        run.reproduce("prepare")
        result = run.reproduce("teacher")
        assert cache.holds(locked_outs(result.entry)) and not run.set_damaged_aside(locked_outs(result.entry))


@pytest.mark.slow
def test_a_model_in_mlflow_is_whole_or_not_ready(disk, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    save_untrained(tmp_path / "student", form="skip", image_shape=(1, 8, 8))
    files = {name: tmp_path / "student" / name for name in MODEL_FILES}
    (tmp_path / "mlruns").symlink_to(disk.folder)
    fill(disk.folder)
    tracker = Tracker(tmp_path)
    with pytest.raises(Exception) as refused, PipelineRun(tracker, "full", {"recipe": "mine"}, {}) as parent:
        tracker.log_student(parent.run_id, Recipe(), files, "v" * 32)
    assert is_disk_full(refused.value), refused.value
    assert tracker.client.get_run(parent.run_id).info.status == "FAILED"
    disk.grow()
    with PipelineRun(tracker, "again", {"recipe": "mine"}, {}) as parent:
        model_id = tracker.log_student(parent.run_id, Recipe(), files, "v" * 32)
    known = tracker.client.search_logged_models([tracker.experiment_id])
    assert [model.model_id for model in known if model.status == "READY"] == [model_id]
    logged = fetch_student(f"models:/{model_id}", tmp_path)
    assert (logged / MODEL_FILES[0]).read_bytes() == files[MODEL_FILES[0]].read_bytes()
