"""The logged student as a model that MLflow serves: the images of `cm sample`, by seed; bad requests named."""

import base64
import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm_core.model import ModelSpec, save_model
from cm_core.networks import SongUNetParams
from cm_core.noise import Noise
from command import run
from flows.recipes.recipe import Recipe
from flows.stages.models import fixed_labels
from flows.stages.sample import Sample
from flows.tracking.tracker import MODEL_FILES, Tracker
from miniature import REPOSITORY, make_bare_workspace, unpack_registered_student
from servers import free_port, process, wait_for_page

MID_SIGMAS = [[], [3.0]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_bare_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def models(root):
    """URIs of two logged students of coloured images: one with 3 classes, one without."""
    tracker, uris, recipe = Tracker(root), {}, Recipe(sample=Sample(mid_sigmas=MID_SIGMAS))
    network = SongUNetParams(channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    for name, classes in (("classes", 3), ("plain", 0)):
        spec = ModelSpec(form="skip", network=network, noise=Noise(), image_shape=(3, 8, 8), num_classes=classes)
        torch.manual_seed(0)
        model = spec.build()
        with torch.no_grad():  # fresh networks end in zeros, whose samples would all be alike
            for weights in model.parameters():
                weights.normal_(0, 0.2)
        (root / "weights" / name).mkdir(parents=True)
        save_model(root / "weights" / name, spec, model.state_dict())
        files = {file: root / "weights" / name / file for file in MODEL_FILES}
        run_id = tracker.client.create_run(tracker.experiment_id).info.run_id
        uris[name] = f"models:/{tracker.log_student(run_id, recipe, files, name)}"
    return uris


@pytest.fixture
def sample(root, monkeypatch, capsys, tmp_path):
    """Draw with `cm sample`; uint8 [N, H, W, C]."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(root)

    def sample(uri, *options):
        code, _, err = run(capsys, "sample", "--model", uri, *options, "--out", str(tmp_path / "drawn.npy"))
        assert code == 0, err
        return np.load(tmp_path / "drawn.npy")

    return sample


def decode(images):
    return np.stack([np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in images])


def test_the_logged_model_holds_no_pickle_and_loads_as_a_pyfunc(root, models, sample, monkeypatch):
    import mlflow

    monkeypatch.setattr(sys, "path", [*sys.path])  # where MLflow puts the model's own code first, and leaves it
    folder = Path(mlflow.artifacts.download_artifacts(models["plain"]))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {
        "MLmodel",
        "artifacts/student/ema.safetensors",
        "code/cm_core/sampling.py",
        "code/flows/inference/server.py",
    } <= files
    assert "code/flows/generate.py" not in files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt"))]
    assert not [name for name in files if "pipeline" in name], "only what drawing needs"
    loaded = mlflow.pyfunc.load_model(models["plain"])
    assert {spec["type"] for spec in loaded.metadata.signature.inputs.to_dict()} == {"object"}
    (answer,) = loaded.predict([{"n": 3, "steps": 2, "seed": 7}])
    drawn = sample(models["plain"], "--n", "3", "--steps", "2", "--seed", "7")
    np.testing.assert_array_equal(decode(answer.images), drawn)
    at_levels = sample(models["plain"], "--n", "3", "--mid-sigmas", "3.0", "--seed", "7")
    np.testing.assert_array_equal(drawn, at_levels)


@contextmanager
def served(uri, root, folder):
    """Serve a model as a team would: from a folder without this code, with nothing of it on the path."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", uri, "--env-manager", "local"]
    env = {"MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}", "PYTHONPATH": "", "DO_NOT_TRACK": "true"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with process([*command, "--host", "127.0.0.1", "--port", str(port)], folder, env) as log:
        wait_for_page(f"http://127.0.0.1:{port}/ping", log)
        yield f"http://127.0.0.1:{port}/invocations"


def ask(address, body):
    """Return (status, answer) of a request."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_a_server_answers_with_the_pictures_that_cm_sample_draws(root, models, sample, tmp_path):
    with served(models["classes"], root, tmp_path) as address:
        status, answer = ask(address, {"inputs": [{"n": 7, "steps": 2, "seed": 5}, {"n": 2}]})
        assert status == 200
        first, second = (decode(one["images"]) for one in answer["predictions"])
        np.testing.assert_array_equal(first, sample(models["classes"], "--n", "7", "--steps", "2", "--seed", "5"))
        np.testing.assert_array_equal(second, sample(models["classes"], "--n", "2"))

        labels = fixed_labels(ModelSpec.model_construct(num_classes=3), range(7), 5, torch.device("cpu")).tolist()
        _, named = ask(address, {"inputs": [{"n": 7, "steps": 2, "seed": 5, "labels": labels}]})
        np.testing.assert_array_equal(decode(named["predictions"][0]["images"]), first)
        _, other = ask(address, {"inputs": [{"n": 7, "steps": 2, "seed": 5, "labels": [2] * 7}]})
        other = decode(other["predictions"][0]["images"])
        changed = [not np.array_equal(one, two) for one, two in zip(first, other, strict=True)]
        assert changed == [label != 2 for label in labels]

        for request, words in (
            ({"n": 0}, "greater than or equal to 1"),
            ({"n": 2.5}, "valid integer"),
            ({"steps": "two"}, "valid integer"),
            ({"number": 3}, "Extra inputs are not permitted"),
            ({"n": 2, "labels": [0]}, "1 of them for n=2 images"),
            ({"n": 2, "labels": [0, 3]}, "labels: 3 is none of the model's classes 0 to 2"),
        ):
            status, answer = ask(address, {"inputs": [request]})
            assert status == 400 and words in answer, answer
        assert ask(address, {"n": 4})[0] == 400


def load_elsewhere(uri, root, folder, request):
    """Load a model and ask it in a process that imports nothing but MLflow; return the images in base64."""
    code = f"""
import mlflow, sys
(answer,) = mlflow.pyfunc.load_model({uri!r}).predict([{request!r}])
own = [module.__file__ for name, module in sys.modules.items() if name.startswith(("cm_core", "flows"))]
assert own and all("/code/" in file for file in own), own
print(*answer.images)
"""
    env = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}", "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1].split()


@pytest.mark.slow
def test_the_packed_code_is_enough(root, models, tmp_path):
    assert len(load_elsewhere(models["plain"], root, tmp_path, {"n": 1})) == 1


BEFORE, CHAMPION = REPOSITORY / "tests" / "fixtures" / "logged_before_wings", "models:/cm-digits@champion"
SETTINGS = {"n": 4, "steps": 2, "seed": 5}
AS_DRAWN = {**SETTINGS, "labels": [0, 1, 2, 0]}  # those that the code of that time drew without being asked


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A workspace with a student that was logged and registered before `flows/` had wings, and the images it drew."""
    root = tmp_path / "before"
    unpack_registered_student(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(root)
    return root, np.load(BEFORE / "drawn.npy")


def test_a_model_logged_before_the_wings_draws_the_same_images_by_its_alias(before, capsys, monkeypatch):
    """As the model does when it is loaded, which draws the images of that time where it is told their labels."""
    import mlflow

    root, drawn = before
    options = [f"--{name}={value}" for name, value in SETTINGS.items()]
    assert run(capsys, "sample", "--model", CHAMPION, *options, "--out", str(root / "now.npy"))[0] == 0
    monkeypatch.setattr(sys, "path", [*sys.path])
    answers = mlflow.pyfunc.load_model(CHAMPION).predict([SETTINGS, AS_DRAWN])
    np.testing.assert_array_equal(np.load(root / "now.npy"), decode(answers[0].images))
    np.testing.assert_array_equal(decode(answers[1].images), drawn)


def test_a_model_logged_before_the_wings_loads_where_the_present_code_is_imported(before, monkeypatch):
    import mlflow

    root, drawn = before
    monkeypatch.setattr(sys, "path", [*sys.path])
    Tracker(root)
    (answer,) = mlflow.pyfunc.load_model(CHAMPION).predict([AS_DRAWN])
    np.testing.assert_array_equal(decode(answer.images), drawn)


@pytest.mark.slow
def test_a_model_logged_before_the_wings_loads_alone_and_is_served(before, tmp_path):
    root, drawn = before
    np.testing.assert_array_equal(decode(load_elsewhere(CHAMPION, root, tmp_path, AS_DRAWN)), drawn)
    with served(CHAMPION, root, tmp_path) as address:
        status, answer = ask(address, {"inputs": [AS_DRAWN]})
    assert status == 200
    np.testing.assert_array_equal(decode(answer["predictions"][0]["images"]), drawn)
