"""EDM2's network through the stages: snapshots that survive a resume, averages rebuilt from them, their curve."""

import csv
import json

import numpy as np
import pytest
import torch

from cm_core.checkpoint import load_tensors
from cm_core.model import load_model
from cm_core.training.posthoc import read_index
from command import run
from flows.errors import UserError
from flows.monitor import Monitor
from flows.recipes.recipe import load_recipe
from flows.stages.sample import load_rebuilt
from flows.stages.training import StageStopped
from small_stages import ROOT, SMALL, files, run_small

WIDTHS = [0.06, 0.1]
RECIPE = load_recipe(
    "digits-edm2",
    [
        *SMALL[1:],
        "network={kind: edm2, channels: 8, channel_mult: [1], num_blocks: 1, attn_resolutions: [],"
        " channels_per_head: 8, embedding: positional, double_norm: true}",
        *(f"teacher.train.{key}=2" for key in ("num_steps", "log_every", "save_every", "grid_every")),
        "teacher.train.batch_size=8",
        *(f"student.train.{key}=1" for key in ("log_every", "save_every", "grid_every")),
        *("student.train.num_steps=6", "student.train.batch_size=8", "student.train.snapshots.count=6"),
        *(f"sample.widths={WIDTHS}", "sample.mid_sigmas=[[]]"),
        *("evaluate.beside_fid=[]", "features.num_steps=10"),
    ],
    root=ROOT,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for stage in ("prepare", "teacher", "student", "sample"):
        run_small(stage, RECIPE, folder)
    return folder


def test_each_average_is_kept_at_each_of_the_steps_in_fp16(made):
    index = read_index(made / "student" / "snapshots")
    assert [(one.step, one.width) for one in index] == [(step, w) for step in range(1, 7) for w in (0.1, 0.05)]
    names = {name for name, _ in load_model(made / "student")[1].named_parameters()}
    for one in index:
        tensors = load_tensors(made / "student" / "snapshots" / one.file)
        assert tensors.keys() == names and {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    last = load_tensors(made / "student" / "snapshots" / index[-2].file)
    model = load_model(made / "student")[1].state_dict()
    assert all(torch.equal(tensor, model[name].half()) for name, tensor in last.items())


def test_a_resumed_training_has_the_same_snapshots(made, tmp_path):
    class Stop(Monitor):
        def stop_requested(self):
            return True

    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    for _ in range(3):
        with pytest.raises(StageStopped):
            run_small("student", RECIPE, tmp_path, Stop(), **places)
    run_small("student", RECIPE, tmp_path, **places)
    assert files(tmp_path / "student") == files(made / "student")


def test_a_model_of_any_width_is_written_by_command(made, tmp_path, capsys):
    status, out, err = run(capsys, "ema", str(made / "student"), "--width", "0.1", "--out", str(tmp_path / "new"))
    assert (status, err) == (0, "") and "an average of width 0.1, its profile 0.00% off" in out
    (spec, found), (expected_spec, expected) = load_model(tmp_path / "new"), load_model(made / "student")
    assert spec == expected_spec
    for name, tensor in expected.state_dict().items():  # width 0.1 is the model's own, but for fp16
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "new" / "origin.json").read_text())["width"] == 0.1


def test_what_cannot_be_rebuilt_is_refused_in_one_line(made, capsys):
    status, out, err = run(capsys, "ema", str(made / "student"), "--width", "0.001")
    assert status == 2 and "width 0.001: the closest average of 12 snapshots" in err and err.count("\n") == 1
    status, out, err = run(capsys, "ema", str(made / "teacher"), "--width", "0.1")
    assert status == 2 and "no snapshots of its weights" in err and "train.snapshots" in err
    with pytest.raises(UserError, match="allowed are widths above 0"):
        load_rebuilt(made / "student", 0.5)


def test_rows_of_other_widths_are_drawn_and_become_a_curve(made):
    rows = {row["name"]: row for row in json.loads((made / "sample" / "samples.json").read_text())["rows"]}
    assert {name: row["width"] for name, row in rows.items() if row["width"]} == {
        "nfe_1_width_0.06": 0.06,
        "nfe_1_width_0.1": 0.1,
    }
    own, same = (np.load(made / "sample" / f"{name}.npy").astype(int) for name in ("nfe_1", "nfe_1_width_0.1"))
    assert np.abs(own - same).max() <= 2  # the first EMA has that width
    for stage in ("features", "edit", "evaluate"):
        run_small(stage, RECIPE, made)
    lines = list(csv.DictReader((made / "evaluate" / "plots" / "fid_over_width.csv").open()))
    metrics = json.loads((made / "evaluate" / "metrics.json").read_text())["fid_classifier"]
    assert [(float(line["width"]), float(line["fid"])) for line in lines] == [
        (width, metrics[f"nfe_1_width_{width:g}"]) for width in WIDTHS
    ]
    of_student = (made / "evaluate" / "plots" / "fid_against_nfe.csv").read_text().splitlines()
    assert len(of_student) == 2, "averages of other widths are no points of the curve over network calls"
    assert "relative width of the EMA" in (made / "evaluate" / "report.html").read_text()


def test_widths_need_snapshots():
    with pytest.raises(UserError, match=r"sample\.widths=\[0\.1\] needs student\.train\.snapshots"):
        load_recipe("digits-ct", ["sample.widths=[0.1]"], root=ROOT)
