"""Bytes that changed after DVC stored them: found before a stage reads them, named, replaced by the right ones."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from command import run as run_command
from flows.errors import UserError
from flows.recipes.recipe import Recipe, load_recipe, write_active
from flows.workspace import clone, dvc_files, integrity
from flows.workspace.data_versions import add_versioned, fetch_versioned
from flows.workspace.dvc_files import Cache, dvc_md5, locked_outs, read_stages
from flows.workspace.integrity import recorded_md5, set_damaged_aside
from image_sources import colours
from live import cm, environment, make_live_workspace
from miniature import REPOSITORY, commit, git, make_workspace
from small_autoencoder import save_autoencoder

WEIGHTS = 'if name == "teacher":\n    (out / "ema.safetensors").write_bytes(bytes(range(256)) * 64)\n'


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("CM_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    root = make_workspace(tmp_path / "workspace")
    with (root / "stage.py").open("a") as script:
        script.write(WEIGHTS)
    commit(root)
    return root


def alter(file, *, unnoticed=False):
    """Alter the last 4 kB of a file in place; `unnoticed` as a failing disk does, which leaves size and time."""
    write(file, file.stat().st_size - 4096, b"x" * 4096, unnoticed=unnoticed)


def write(file, place, content, *, unnoticed):
    status = file.stat()
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(content)
    file.chmod(status.st_mode)
    if unnoticed:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def cached(root, entry, path="out/teacher", name="ema.safetensors"):
    return Cache(root / ".dvc" / "cache").files(locked_outs(entry)[path])[name]


def reproduce(root, *stages):
    """Bring stages up in a run of its own; return their results and hashes of what lies in the clone."""
    with clone.clone(root, "run") as run:
        results = {stage: run.reproduce(stage) for stage in stages}
        return results, {path: dvc_md5(run.root / path) for one in results.values() for path in locked_outs(one.entry)}


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True])
def test_damaged_weights_in_the_cache_are_named_and_brought_again(root, tmp_path, remote, caplog):
    """Computed again, or from a remote fetched again."""
    if remote:
        (root / ".dvc" / "config.local").write_text(
            f"[core]\n    remote = team\n['remote \"team\"']\n    url = {tmp_path}/remote\n"
        )
    made, right = reproduce(root, "prepare", "teacher")
    alter(cached(root, made["teacher"].entry))
    found, hashes = reproduce(root, "prepare", "teacher")
    assert found["teacher"].cached == remote and found["prepare"].cached
    assert hashes == right and found["teacher"].entry["outs"] == made["teacher"].entry["outs"]
    (named,) = [line for line in caplog.messages if "damaged" in line]
    assert named.startswith("out/teacher/ema.safetensors: damaged in DVC's cache, moved to ")
    (aside,) = (root / ".dvc/cache/damaged").iterdir()
    assert b"x" * 4096 in aside.read_bytes()
    assert not set_damaged_aside(root, locked_outs(found["teacher"].entry), recorded_md5(root))


@pytest.mark.slow
def test_a_stage_that_runs_again_writes_through_no_link(root):
    with clone.clone(root, "run") as run:
        run.reproduce("prepare")
        first = run.reproduce("teacher").entry
        assert (run.root / "out/teacher/ema.safetensors").samefile(cached(root, first)), "a link"
        (run.root / "params/active.yaml").write_text("seed: 1\nteacher: other\nfeatures: 1\n")
        second = run.reproduce("teacher")
        assert not second.cached and second.entry["outs"] != first["outs"]
        assert not run.set_damaged_aside(locked_outs(first))


@pytest.mark.soak
def test_a_flow_computes_nothing_from_damaged_weights(root, monkeypatch):
    from flows import pipeline

    said = []  # where a log goes depends on the flows that this process ran before
    monkeypatch.setattr(integrity.logger, "warning", lambda text, *values: said.append(text % values))
    first = pipeline.run(Recipe(), root, keep=False)
    alter(cached(root, first["stages"]["teacher"]["entry"]))
    text = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(text.replace("python stage.py evaluate", "python  stage.py evaluate"))
    again = pipeline.run(Recipe(), root, keep=False)
    assert {stage: result["cached"] for stage, result in again["stages"].items()} == {
        "prepare": True,
        "features": True,
        "teacher": False,
        "evaluate": False,
    }
    assert again["metrics"] == first["metrics"]
    assert any(line.startswith("out/teacher/ema.safetensors: damaged in DVC's cache, moved to ") for line in said)
    for stage in ("teacher", "evaluate"):
        assert again["stages"][stage]["entry"]["outs"] == first["stages"][stage]["entry"]["outs"]


def test_the_record_reads_a_file_again_only_if_it_changed(root, monkeypatch):
    read, path, md5 = [], root / "file", recorded_md5(root)
    monkeypatch.setattr(
        "flows.storage.digests.file_digest", lambda path, name: read.append(path) or dvc_files.file_md5(path)
    )
    path.write_bytes(bytes(16384))
    (root / "link").hardlink_to(path)
    (root / "soft").symlink_to(path)
    before = md5(path)
    assert [md5(one) for one in (path, root / "link", root / "soft")] == [before] * 3 and len(read) == 1
    alter(path)
    assert md5(path) == dvc_files.file_md5(path) != before and len(read) == 2
    alter(path, unnoticed=True)
    path.with_name("new").write_bytes(path.read_bytes())
    assert md5(root / "new") == dvc_files.file_md5(path) and len(read) == 3


@pytest.mark.slow
def test_versioned_data_whose_bytes_changed_are_not_taken_for_their_version(root):
    (root / "data").mkdir()
    (root / "data/array.npy").write_bytes(bytes(range(256)) * 64)
    version = add_versioned(root, "data/array.npy", "numbers", {})
    assert fetch_versioned(root, "data/array.npy", version) == {"data/array.npy": version}
    alter(root / "data/array.npy")
    with pytest.raises(UserError, match=rf"array\.npy: not the bytes of version {version}"):
        fetch_versioned(root, "data/array.npy", version)
    git(root, "add", "--all")
    commit(root)
    alter(Cache(root / ".dvc/cache").files(version)[""])
    with clone.clone(root, "run") as copy, pytest.raises(UserError, match="dvc pull data/array.npy.dvc failed"):
        fetch_versioned(copy.root, "data/array.npy", version)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real pipeline, its images prepared."""
    root = make_live_workspace(tmp_path_factory.mktemp("real") / "workspace")
    assert cm(root, "use", "tiny").returncode == 0
    done = dvc(root, "repro", "prepare")
    assert done.returncode == 0, done.stderr
    return root


def dvc(root, *arguments):
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_no_input_is_read_for_its_hash_while_a_slot_is_held(real, monkeypatch):
    """Bytes altered without a trace when the slot is taken: whoever read them would refuse them as damaged."""
    for name in ("CM_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    prepared = cached(real, dvc_files.read_lock(real)["prepare"], "out/prepare", "train_images.npy")
    right = prepared.read_bytes()

    @contextmanager
    def slot():
        assert (run.root / "out/prepare/train_images.npy").samefile(prepared), "a link, no copy"
        alter(prepared, unnoticed=True)
        yield {}

    with clone.clone(real, "run") as run:
        dvc_files.update_lock(run.root, {"prepare": dvc_files.read_lock(real)["prepare"]})
        assert not run.reproduce("features", slot=slot).cached
    write(prepared, 0, right, unnoticed=True)


@pytest.mark.slow
def test_no_data_and_no_autoencoder_is_read_for_its_hash_while_a_slot_is_held(real, tmp_path, monkeypatch):
    """As above, for `prepare` with latents: what it reads is no other stage's."""
    pytest.importorskip("diffusers")
    for name in ("CM_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, autoencoder = tmp_path / "workspace", save_autoencoder(tmp_path / "vae", channels=3)
    git(tmp_path, "clone", "--quiet", "--local", str(real), str(root))
    (root / "data").mkdir(exist_ok=True)
    np.save(root / "data" / "array.npy", colours(400, size=(8, 8)))
    source = {"kind": "array", "path": "data/array.npy"}
    source["version"] = add_versioned(root, source["path"], "colours", {})
    git(root, "add", "--all")
    commit(root)
    overrides = [f"data.source={json.dumps(source)}", f"data.latents.autoencoder={autoencoder}"]
    loaded = load_recipe("tiny", overrides, root=root, base=root)

    @contextmanager
    def slot():
        alter(run.root / source["path"], unnoticed=True)
        weights = autoencoder / "diffusion_pytorch_model.safetensors"
        write(weights, weights.stat().st_size - 4, bytes(4), unnoticed=True)
        yield {}

    with clone.clone(root, "run") as run:
        write_active(loaded, run.root)
        assert read_stages(run.root)["prepare"].needs == "gpu" and loaded.data.latents.sha256
        (tmp_path / "cache" / "consistency-pipeline" / "hashes.db").unlink()  # of a worker that was handed the values
        assert not run.reproduce("prepare", slot=slot).cached


@pytest.mark.parametrize("role", ["teacher", "base", "student"])
def test_weights_that_are_imported_are_read_without_a_slot(role, tmp_path):
    """Whole checkpoints are hashed and read; nothing is computed."""
    shutil.copyfile(REPOSITORY / "dvc.yaml", tmp_path / "dvc.yaml")
    overrides = ["base={method: {kind: ect}}"] if role == "base" else []
    for more, needs in (([], "gpu"), ([f"{role}.weights=/there", f"{role}.sha256={'a' * 64}"], "cpu")):
        write_active(load_recipe("digits-cd", [*overrides, *more], root=REPOSITORY), tmp_path)
        assert read_stages(tmp_path)[role].needs == needs


@pytest.mark.slow
def test_dvc_repro_too_hands_no_damaged_bytes_to_a_stage(real):
    """`dvc checkout` copies a damaged object and takes it for the right one."""
    right = dvc_md5(real / "out/prepare")
    alter(cached(real, dvc_files.read_lock(real)["prepare"], "out/prepare", "train_images.npy"))
    shutil.rmtree(real / "out/prepare")
    assert dvc(real, "checkout", "prepare").returncode == 0 and dvc_md5(real / "out/prepare") != right
    done = dvc(real, "repro", "features")
    assert done.returncode != 0
    assert "cm: out/prepare: not the bytes that DVC stored; remove it and start again" in done.stderr + done.stdout
    shutil.rmtree(real / "out/prepare")
    assert dvc(real, "repro", "prepare").returncode == 0 and dvc_md5(real / "out/prepare") == right


@pytest.mark.slow
def test_the_doctor_reads_all_of_the_cache(root, monkeypatch, capsys):
    """What a failing disk altered has kept size and time."""
    made, _ = reproduce(root, "prepare", "teacher")
    monkeypatch.chdir(root)
    code, says, _ = run_command(capsys, "doctor", "--verify")
    assert code == 0 and " objects, " in says and "every byte as stored" in says
    assert not set_damaged_aside(root, locked_outs(made["teacher"].entry), recorded_md5(root)), "on record as sound"
    file = cached(root, made["teacher"].entry)
    alter(file, unnoticed=True)
    assert not set_damaged_aside(root, locked_outs(made["teacher"].entry), recorded_md5(root)), (
        "the record alone does not show it"
    )
    code, says, _ = run_command(capsys, "doctor", "--verify")
    assert code == 1 and f"{file.parent.name}{file.name}" in says and not file.exists()
    assert run_command(capsys, "doctor", "--verify")[0] == 0
    found, _ = reproduce(root, "prepare", "teacher")
    assert not found["teacher"].cached and found["teacher"].entry == made["teacher"].entry
