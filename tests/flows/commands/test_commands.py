"""Subcommands that compute: images of a model, metrics of images, runs side by side, the table of the demo."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cm_core.model import ModelSpec, save_model
from cm_core.networks import MLPParams
from cm_core.noise import Noise
from cm_core.sampling import ImageNoise, TeacherSampler, multistep
from cm_core.tensors import to_pixels
from command import run
from flows.commands.run import demo_rows
from flows.commands.runs import describe, select
from flows.data.dataset import load_dataset
from flows.monitor import Monitor
from flows.operations.process_trees import still_runs
from flows.recipes.recipe import Recipe, load_recipe, write_active
from flows.reports.metrics_table import by_row
from flows.stages.features import features
from flows.stages.prepare import prepare
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.registry import Registry
from flows.tracking.tracker import MODEL_FILES, Tracker
from miniature import REPOSITORY, make_workspace, traced
from processes import wait_until

RECIPE = """
data: {max_images: 120}
teacher: null
features: {kind: classifier, num_steps: 10, width: 8}
student: {method: ct}
sample: {mid_sigmas: [[], [3.0]]}
evaluate: {kid_subsets: 2}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workspace with prepared digits and their features, and the models of an untrained network."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "params" / "recipes").mkdir(parents=True)
    (root / "params" / "recipes" / "tiny.yaml").write_text(RECIPE)
    (root / "dvc.yaml").write_text("stages: {}\n")
    recipe = load_recipe("tiny", root=root)
    write_active(recipe, root)
    prepare(recipe.data, root / "out/prepare", Monitor())
    (root / "out/features").mkdir()
    features(0, recipe.features, root / "out/prepare", root / "out/features", Monitor())
    forms = {"student": "skip", "teacher": "denoiser", "generator": "generator", "truncated": "unshifted"}
    for name, form in forms.items():
        split = 1.0 if name == "truncated" else None
        spec = ModelSpec(form=form, network=MLPParams(), noise=Noise(), image_shape=(1, 8, 8), truncated_at=split)
        (root / "out" / name).mkdir()
        torch.manual_seed(0)
        model = spec.build()
        with torch.no_grad():  # fresh networks may end in zeros, whose samples would all be alike
            for weights in model.parameters():
                weights.normal_(0, 0.1)
        save_model(root / "out" / name, spec, model.state_dict())
    return root


@pytest.fixture
def root(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    return prepared


def drawn(root, name, count, sampler):
    """Return what a sampler makes of the model, computed here."""
    from cm_core.model import load_model

    spec, model = load_model(root / "out" / name)
    noise = ImageNoise(5, range(count), spec.image_shape, torch.device("cpu"))
    with torch.no_grad():
        return to_pixels(sampler(model, noise, spec)).numpy()


@pytest.mark.parametrize(
    ("options", "sigmas"),
    [
        ((), [80.0]),
        (("--steps", "2"), [80.0, 3.0]),
        (("--mid-sigmas", "7", "0.5"), [80.0, 7.0, 0.5]),
        (("--steps", "3"), Noise().grid(4).tolist()[:3]),
    ],
)
def test_sample_draws_from_the_student_at_the_levels_asked_for(root, tmp_path, capsys, options, sigmas):
    code, out, _ = run(capsys, "sample", *options, "--n", "3", "--seed", "5", "--out", str(tmp_path / "new" / "a.npy"))
    expected = drawn(root, "student", 3, lambda f, noise, _: multistep(f, noise, sigmas, sigma_min=0.002))
    assert code == 0 and f"{len(sigmas)} network call{'s' * (len(sigmas) > 1)} at" in out
    np.testing.assert_array_equal(np.load(tmp_path / "new" / "a.npy"), expected)
    assert np.ptp(expected) > 0 and (tmp_path / "new" / "a.png").exists()


def test_sample_writes_a_folder_of_pictures_and_a_grid_beside_it(root, tmp_path, capsys):
    run(capsys, "sample", "--model", "out/teacher", "--steps", "4", "--n", "2", "--seed", "5", "--out", f"{tmp_path}/b")
    sampler = TeacherSampler(num_steps=4)
    expected = drawn(root, "teacher", 2, lambda denoiser, noise, spec: sampler.sample(denoiser, noise, spec.noise))
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["000000.png", "000001.png"]
    for index, pixels in enumerate(expected):
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "b" / f"{index:06d}.png")), pixels[..., 0])
    assert (tmp_path / "b.png").exists()


def test_sample_writes_one_picture_if_a_picture_is_asked_for(root, tmp_path, capsys):
    code, out, _ = run(capsys, "sample", "--n", "3", "--out", str(tmp_path / "new" / "all.png"))
    assert code == 0 and out.endswith("all.png: 3 of 3 images, 1 network call at sigma 80\n")
    with Image.open(tmp_path / "new" / "all.png") as picture:
        assert picture.format == "PNG" and [path.name for path in (tmp_path / "new").iterdir()] == ["all.png"]


def test_a_folder_may_be_called_like_a_picture(root, tmp_path, capsys):
    folder = tmp_path / "a.png"
    folder.mkdir()
    assert run(capsys, "sample", "--n", "2", "--out", str(folder))[0] == 0
    assert len(list(folder.iterdir())) == 2 and (tmp_path / "a.png.png").is_file()


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (("--model", "out/teacher", "--steps", "1"), ["teacher", "--steps 2"]),
        (("--model", "out/generator", "--steps", "2"), ["distilled to --steps 1", "no --mid-sigmas"]),
        (("--model", "out/generator", "--mid-sigmas", "1"), ["distilled to --steps 1", "no --mid-sigmas"]),
        (("--mid-sigmas", "90"), ["--mid-sigmas", "90"]),
        (("--model", "out/truncated", "--mid-sigmas", "0.9"), ["--mid-sigmas", "trained at noise levels from 1 on"]),
        (("--steps", "3", "--mid-sigmas", "1"), ["--steps 3", "2 --mid-sigmas"]),
    ],
)
def test_sample_refuses_levels_that_make_no_sense(root, tmp_path, capsys, argv, names):
    code, _, err = run(capsys, "sample", *argv, "--out", str(tmp_path / "never"))
    assert code == 2 and err.count("\n") == 1 and all(name in err for name in names), err
    assert not (tmp_path / "never").exists()


def test_sample_takes_a_model_from_mlflow(root, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    files = {name: root / "out" / "student" / name for name in MODEL_FILES}
    tracker = Tracker(root)
    run_id = tracker.client.create_run(tracker.experiment_id).info.run_id
    model = f"models:/{tracker.log_student(run_id, Recipe(), files, 'a data version')}"
    for name, place in (("logged", model), ("local", "out/student")):
        assert run(capsys, "sample", "--model", place, "--n", "2", "--out", str(tmp_path / f"{name}.npy"))[0] == 0
    assert (tmp_path / "logged.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()
    code, _, err = run(capsys, "sample", "--model", "models:/m-nothing")
    assert code == 2 and err.startswith("cm: models:/m-nothing: ") and err.count("\n") == 1


def test_evaluate_measures_images_in_any_container_alike(root, tmp_path, capsys):
    heldout = load_dataset(root / "out" / "prepare").heldout_images
    np.save(tmp_path / "images.npy", heldout)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for index, pixels in enumerate(heldout):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.fromarray(pixels[..., 0]).convert("RGB").save(tmp_path / "images" / f"{index:03d}.png")
            archive.write(tmp_path / "images" / f"{index:03d}.png", f"{index:03d}.png")
    places = [str(tmp_path / name) for name in ("images", "images.zip", "images.npy")]
    code, out, _ = run(capsys, "evaluate", *places, "out/student", "--n", "20", "--json")
    found = json.loads(out)
    assert code == 0 and found["network"] == "classifier"
    real = found["rows"]["real (held out)"]
    for place in places:
        assert found["rows"][place] == pytest.approx(real, rel=1e-6)
    assert found["images"]["out/student"] == 20 and found["rows"]["out/student"]["fid"] > 2 * real["fid"]
    table = run(capsys, "evaluate", places[2])[1]
    assert f"{places[2]} ({len(heldout)})" in table and f"{real['fid']:#.4g}" in table


def test_evaluate_refuses_images_of_another_size(root, tmp_path, capsys):
    np.save(tmp_path / "large.npy", np.zeros((4, 9, 9, 1), np.uint8))
    code, _, err = run(capsys, "evaluate", str(tmp_path / "large.npy"))
    assert code == 2 and err == f"cm: {tmp_path}/large.npy: the images are 9x9, those of the data set digits are 8x8\n"


def metrics(**rows):
    return {"fid_classifier": dict(rows), "kid_classifier": {name: value / 100 for name, value in rows.items()}}


def test_metrics_turn_into_rows():
    network, rows = by_row(metrics(real=1.0, nfe_1=2.0))
    assert network == "classifier"
    assert rows == {"real": {"fid": 1.0, "kid": 0.01}, "nfe_1": {"fid": 2.0, "kid": 0.02}}


def test_the_demo_shows_floor_ceiling_teacher_and_both_students():
    distilled = metrics(real=1.0, untrained=5.0, nfe_1=3.0, nfe_2=2.5, teacher_nfe_35=2.0)
    isolated = metrics(real=1.0, untrained=9.0, nfe_1=4.0, nfe_2=3.5)
    _, rows = demo_rows(distilled, isolated)
    assert {name: row["fid"] for name, row in rows.items()} == {
        "real": 1.0,
        "untrained": 9.0,
        "teacher_nfe_35": 2.0,
        "cd nfe_1": 3.0,
        "cd nfe_2": 2.5,
        "ct nfe_1": 4.0,
        "ct nfe_2": 3.5,
    }


def test_runs_stand_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "runs") == (0, "No runs yet; `cm run RECIPE` makes one\n", "")
    assert not (tmp_path / "mlflow.db").exists()

    ids = []
    for solver, fid in (("heun", 2.5), ("euler", 3.5)):
        params = {"student.method.kind": "cd", "student.method.solver": solver, "seed": 0}
        with PipelineRun(Tracker(tmp_path), f"digits {solver}", {"recipe": "digits"}, params) as parent:
            parent.log_evaluation({"fid_classifier": {"nfe_1": fid, "real": 1.0}}, {}, {}, {})
        ids.append(parent.run_id)
    lines = run(capsys, "runs")[1].splitlines()
    rows = [line.split() for line in lines if line.strip()][2:]
    assert [row[:4] for row in rows] == [[one[:8], "digits", "cd", "finished"] for one in reversed(ids)]
    assert [row[-1] for row in rows] == ["3.500", "2.500"] and "nfe_1/fid" in lines[1]
    found = json.loads(run(capsys, "runs", "--json", "--max", "1")[1])
    assert [one["id"] for one in found] == [ids[1]] and found[0]["metrics"] == {"nfe_1/fid": 3.5}
    compare(tmp_path, capsys, ids)
    assert_database_says_what_mlflow_says(tmp_path, monkeypatch)


def assert_database_says_what_mlflow_says(root, monkeypatch):
    """The list is read from MLflow's tables, which another version of MLflow may lay out otherwise."""
    tracker = Tracker(root)
    newest = Namespace(where=[], sort=None, max=100)
    deleted = tracker.start_run("deleted", {"stage": "pipeline"}, command="consistency", parent_run_id=None)
    tracker.client.delete_run(deleted)
    with PipelineRun(tracker, "not a number", {"recipe": "digits"}, {}) as parent:
        tracker.log_numbers(parent.run_id, {"loss": float("nan"), "fid": 1.5})
        read = [describe(one) for one in select(root, newest)]
        assert len(read) == 4 and read[0]["status"] == "running" and read[0]["seconds"] is None
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
        assert repr([describe(one) for one in select(root, newest)]) == repr(read)  # nan != nan


def compare(root, capsys, ids):
    """Runs are named by id, name, recipe or alias; only the differing params are shown."""
    out = run(capsys, "runs", "compare", ids[0][:12], "digits euler")[1]
    short = [one[:8] for one in ids]
    assert "student.method.solver   heun       euler" in out and "seed" not in out
    (line,) = [line for line in out.splitlines() if line.split()[:1] == ["nfe_1/fid"]]
    assert line.split() == ["nfe_1/fid", "2.500", "3.500", "+1.000"] and f"{short[1]} - {short[0]}" in out

    tracker = Tracker(root)
    with suppress(KeyboardInterrupt), PipelineRun(tracker, "digits heun", {"recipe": "digits"}, {}):
        raise KeyboardInterrupt  # newer, but a name means the newest run that finished
    model = tracker.client.create_logged_model(tracker.experiment_id, "student").model_id
    tags = {"data": "d", "protocol": "p", "run_id": ids[0]}
    Registry(tracker).register("cm-digits", model, {"nfe_1/fid": 2.5}, tags)
    for names in (
        ("champion", "digits"),
        ("cm-digits@candidate", ids[1]),
        ("digits heun", "digits euler", "digits heun"),
    ):
        found = json.loads(run(capsys, "runs", "compare", *names, "--json")[1])
        assert [one["id"] for one in found["runs"]] == [*ids, *ids[: len(names) - 2]]
        assert found["params"]["student.method.solver"][:2] == ["heun", "euler"]
        assert found["metrics"][0]["differences"][0] == 1.0
    for names, words in (
        (("zzz", ids[0]), "run 'zzz': no pipeline run"),
        (("it's", ids[0]), 'run "it\'s": no pipeline run'),
        (('it\'s "it"', ids[0]), "no pipeline run"),
        ((ids[0], "cm-digits@best"), "no version has this alias; there are candidate, champion"),
        ((ids[0], "cm-none@champion"), "no registered model 'cm-none'; there are cm-digits"),
    ):
        code, _, err = run(capsys, "runs", "compare", *names)
        assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.soak
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_nothing_running(tmp_path, number, code):
    root = make_workspace(tmp_path)
    (root / "params" / "recipes").mkdir()
    (root / "params" / "recipes" / "tiny.yaml").write_text("seed: 4\n")
    trace = tmp_path / "out" / "trace"
    trace.parent.mkdir()
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MINI_TRACE": str(trace), "MINI_SECONDS": "600"}
    command = psutil.Popen(
        [sys.executable, "-m", "flows.cli", "run", "tiny"], cwd=root, env=env, stderr=subprocess.PIPE
    )
    wait_until(lambda: traced(trace) or command.poll() is not None)
    children = command.children(recursive=True)
    command.send_signal(number)
    _, err = command.communicate()
    assert len(children) >= 3 and command.returncode == code, err.decode()
    wait_until(lambda: not [child for child in children if still_runs(child)])
