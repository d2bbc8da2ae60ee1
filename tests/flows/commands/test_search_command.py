"""`cm search`: candidates measured with the same noise, the best usable as printed, nothing trained twice."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from cm_core.noise import Noise
from command import run
from flows.commands.search import Scorer, find, make_grid, report, set_override
from flows.data.feature_files import load_feature_files
from flows.errors import UserError
from flows.monitor import Monitor
from flows.recipes.recipe import load_active, load_recipe, write_active
from flows.stages.features import features
from flows.stages.prepare import prepare
from flows.tracking.tracker import Tracker
from miniature import REPOSITORY, save_untrained

RECIPE = """
data: {max_images: 120}
teacher: null
features: {kind: classifier, num_steps: 10, width: 8}
student: {method: ct}
"""
ENTRIES = {name: {"outs": [{"path": f"out/{name}", "md5": f"{name}.dir"}]} for name in ("student", "features")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with the features of digits and the model of an untrained network."""
    root = tmp_path_factory.mktemp("searched")
    (root / "params" / "recipes").mkdir(parents=True)
    (root / "params" / "recipes" / "tiny.yaml").write_text(RECIPE)
    (root / "dvc.yaml").write_text("stages: {}\n")
    recipe = load_recipe("tiny", root=root)
    write_active(recipe, root)
    prepare(recipe.data, root / "out/prepare", Monitor())
    (root / "out/features").mkdir()
    features(0, recipe.features, root / "out/prepare", root / "out/features", Monitor())
    save_untrained(root / "out" / "student", form="skip", image_shape=(1, 8, 8))
    return root


def arguments(**given):
    return Namespace(**{"recipe": "tiny", "overrides": [], "num_images": None, "json": False, "write": False, **given})


@pytest.fixture
def found(root, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(root)
    recipe = load_recipe("tiny", root=root)
    grid = make_grid(recipe, 2, 7)
    return recipe, find(recipe, grid, arguments(nfe=2), SimpleNamespace(root=root, shared_root=root), ENTRIES)


def test_a_search_measures_finds_and_logs(root, found, capsys):
    recipe, found = found
    assert found["grid"] == [float(f"{sigma:.4g}") for sigma in Noise().grid(7).tolist()]
    assert found["metric"] == "fid_classifier" and found["num_images"] == 120, "as many as compared with"
    assert found["compared_with"] == "120 held-out images"
    scorer = Scorer(recipe, root, None)
    for one in found["candidates"]:
        assert one["sigmas"] == [found["grid"][index] for index in one["indices"]]
        assert scorer.fid(one["sigmas"], "again") == pytest.approx(one["fid"], rel=1e-6), "the noise is the same"
    assert found["best"]["fid"] == min(one["fid"] for one in found["candidates"])
    assert len({one["fid"] for one in found["candidates"]}) == len(found["candidates"]) > 1

    tracker = Tracker(root)
    logged = tracker.client.search_runs([tracker.experiment_id], "tags.stage = 'search'")[0]
    assert logged.info.status == "FINISHED" and logged.data.tags["recipe"] == "tiny"
    assert json.loads(logged.data.tags["search.mid_sigmas"]) == found["best"]["sigmas"][1:]
    assert logged.data.tags["dvc.dep.student"] == "student.dir" and logged.data.params["search.nfe"] == "2"
    assert logged.data.metrics["best/fid_classifier"] == found["best"]["fid"]
    history = tracker.client.get_metric_history(logged.info.run_id, "fid_classifier")
    assert [metric.value for metric in history] == [one["fid"] for one in found["candidates"]]
    assert [file.path for file in tracker.client.list_artifacts(logged.info.run_id)] == ["search.json"]


def test_a_search_looks_at_no_image_of_the_evaluation(root, monkeypatch):
    """Neither its noise nor, where enough images are held out, its reference are those of the final numbers."""
    import flows.inference.generate as generate

    recipe, seen = load_recipe("tiny", root=root), []
    draw = generate.draw_images
    monkeypatch.setattr(generate, "draw_images", lambda *args, **how: seen.append(how["seed"]) or draw(*args, **how))
    scorer = Scorer(recipe, root, 8)
    scorer.fid([80.0, 1.0], "a candidate")
    assert seen and recipe.sample.seed not in seen
    trained_on = load_feature_files(root / "out" / "features").reference.statistics
    assert not np.allclose(scorer.reference.statistics.mu, trained_on.mu)


def test_the_result_is_printed_as_it_can_be_used_and_written(root, found, capsys):
    recipe, found = found
    override = set_override(found["best"]["sigmas"])
    report(recipe, found, arguments(write=True))
    out, _ = capsys.readouterr()
    assert f"Use it with: --set {override}" in out and out.count("best") == 1
    active = load_active(root)
    assert active == load_recipe("tiny", [override], root=root)
    assert active.sample.mid_sigmas == ((), tuple(found["best"]["sigmas"][1:]))
    report(recipe, found, arguments(json=True))
    assert json.loads(capsys.readouterr().out) == {**found, "set": override}


def test_the_override_is_short_and_exact():
    assert set_override([80.0, 0.82]) == "sample.mid_sigmas=[[],[0.82]]"
    assert set_override([80.0, 24.4, 0.001234]) == "sample.mid_sigmas=[[],[24.4,0.001234]]"


def test_the_grid_is_the_methods_own():
    assert len(make_grid(load_recipe("digits-cd", root=REPOSITORY), 2, None)) == 18
    assert len(make_grid(load_recipe("digits-ct", root=REPOSITORY), 2, None)) == 40
    assert len(make_grid(load_recipe("digits-meanflow", root=REPOSITORY), 2, None)) == 40
    for kind, method in {"pd": "{kind: pd, start_steps: 4}", "dmd": "dmd"}.items():
        fixed = load_recipe("digits-cd", [f"student.method={method}"], root=REPOSITORY)
        with pytest.raises(UserError, match=f"student.method.kind={kind}: its training fixes the levels"):
            make_grid(fixed, 2, None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("tiny",), ["--nfe"]),
        (("tiny", "--nfe", "1"), ["--nfe 1", "between 2 and 39"]),
        (("tiny", "--nfe", "6", "--num-scales", "6"), ["--nfe 6", "between 2 and 5"]),
        (("tiny", "--nfe", "2", "--num-images", "1"), ["--num-images 1"]),
        (("nope", "--nfe", "2"), ["'nope'", "tiny"]),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_before_anything_runs(root, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(root)
    code, _, err = run(capsys, "search", *argv)
    assert code == 2 and err.startswith("cm: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (root / ".cm" / "runs").exists()


SMALL = (
    *("network={kind: song_unet, channels: 8, channel_mult: [1], num_blocks: 1, attn_resolutions: []}",),
    *("data.max_images=60", "features.num_steps=10", "student.train.num_steps=4", "student.train.batch_size=8"),
    *("student.train.log_every=2", "student.train.save_every=2", "student.train.grid_every=2"),
)


@pytest.mark.soak
def test_a_search_trains_what_is_missing_once_and_cm_sample_uses_what_it_found(tmp_path):
    root = tmp_path / "workspace"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(root)], check=True)
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def cm(*argv):
        command = [sys.executable, "-m", "flows.cli", *argv]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    options = [word for value in SMALL for word in ("--set", value)]
    command = ("search", "digits-ct", *options, "--nfe", "2", "--num-scales", "5", "--num-images", "40")
    first, said = cm(*command, "--json")
    assert all(f"{stage}: done in" in said for stage in ("prepare", "features", "teacher", "student"))
    again, said = cm(*command, "--json", "--write")
    assert all(f"{stage}: cached" in said for stage in ("prepare", "features", "teacher", "student"))
    assert again == first, "the same candidates, the same numbers"

    mid = json.loads(first)["best"]["sigmas"][1]
    assert f"mid_sigmas:\n  - []\n  - [{mid:g}]" in (root / "params" / "active.yaml").read_text()
    model = ("--model", str(next((root / ".cm" / "runs").glob("*/workspace/out/student"))))
    drawn, _ = cm("sample", *model, "--steps", "2", "--n", "2", "--out", str(tmp_path / "drawn"))
    assert f"2 network calls at sigma 80, {mid:.4g}" in drawn
    assert np.asarray(Image.open(tmp_path / "drawn" / "000001.png")).shape == (8, 8)
