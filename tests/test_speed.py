"""Fast and memory-saving forms of training differ by rounding alone; their cost is counted right."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_formulas
from cm_core.methods.base import grid_on
from cm_core.methods.cd import CD
from cm_core.methods.cmt import CMT
from cm_core.methods.ct import CT
from cm_core.methods.ect import ECT
from cm_core.methods.edm import EDM
from cm_core.methods.meanflow import MeanFlow
from cm_core.methods.scm import SCM
from cm_core.methods.tcm import TCM
from cm_core.model import ModelSpec
from cm_core.networks import SongUNetParams, modes
from cm_core.noise import Noise
from cm_core.philox import normals, philox
from cm_core.training.config import Train
from cm_core.training.cost import StepCost, advice, step_cost
from cm_core.training.profiling import RECORDED, SKIPPED
from flows.cli import main
from flows.monitor import PROFILE_VARIABLE
from method_oracles import every_method
from small_networks import build_shaken, pass_through, small_networks
from small_stages import run_small, small_recipe

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NETWORKS = small_networks(channels_per_head=8, fourier_scale=16)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_fused_form_of_the_layers_computes_the_same(monkeypatch, name):
    """The formulas that the kernels compute, by PyTorch on the CPU; test_kernels.py compares the kernels themselves."""
    net = build_shaken(NETWORKS[name])
    expected = pass_through(net)
    monkeypatch.setitem(sys.modules, "cm_core.networks.kernels", fused_formulas)
    monkeypatch.setattr(modes, "fuses", lambda x: True)
    for found, true in zip(pass_through(net), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [  # the vectors that come with Random123
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_published_vectors(counter, seed, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), seed)
    assert tuple(int(word) for word in words) == expected


def test_normals_are_normal_and_a_function_of_their_place():
    z = normals(torch.arange(400), 0, 501, seed=7)
    moments = [z.double().pow(k).mean().item() for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.04)  # five standard errors of the last
    assert torch.equal(normals(torch.tensor([3, 399]), 0, 501, seed=7), z[[3, 399]])
    others = [normals(torch.arange(400), 1, 501, seed=7), normals(torch.arange(400), 0, 501, seed=8), z.roll(1, 0)]
    assert all(abs((z * other).mean()) < 0.012 for other in others)  # uncorrelated


# A forward-mode derivative takes two passes, for its value and for the tangent.
PASSES = [(EDM(), 3), (CT(), 4), (CD(solver="heun"), 6), (CD(solver="euler"), 5), (SCM(), 5), (MeanFlow(), 5)]
# A trajectory of CMT has as many rows as points, and the teacher sees each once, or with Heun twice.
PASSES += [(CMT(num_steps=4), 4), (CMT(num_steps=4, solver="heun"), 5), (TCM(), 5)]


@pytest.mark.parametrize(("method", "passes"), PASSES)
def test_a_step_costs_as_many_forward_passes_as_the_method_makes(method, passes):
    spec = ModelSpec(form=method.form, network=NETWORKS["ddpmpp"], noise=Noise(), image_shape=(1, 8, 8))
    cost = step_cost(method, spec, num_emas=1, bytes_per_value=2)
    plain = step_cost(EDM(), spec, num_emas=1, bytes_per_value=2)
    forward = plain.flops_per_image / 3
    assert cost.flops_per_image == pytest.approx(passes * forward, rel=0.01)  # the first layer needs no input gradient
    assert cost.checkpointed_image_bytes < cost.image_bytes
    copies = (cost.state_bytes - plain.state_bytes) / cost.parameters / 4
    assert copies == method.needs_teacher + method.keeps_target + method.needs_base
    assert type(grid_on(Noise(), 18, CPU)) is torch.Tensor  # counting left no shape without values behind


@pytest.mark.slow
@every_method
def test_a_step_of_every_method_can_be_counted(method):
    network = NETWORKS["ddpmpp"].model_copy(update={"dropout": 0.2})
    spec = ModelSpec(form=method.form, network=network, noise=Noise(), image_shape=(1, 8, 8), num_classes=4)
    cost = step_cost(method, spec, num_emas=1, bytes_per_value=4)
    assert cost.flops_per_image > 3 * cost.forward_flops > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_every_network_can_be_counted(name):
    spec = ModelSpec(form="unshifted", network=NETWORKS[name], noise=Noise(), image_shape=(1, 8, 8), num_classes=4)
    cost = step_cost(SCM(), spec, num_emas=1, bytes_per_value=4)
    assert cost.flops_per_image > 4 * cost.forward_flops > 0 and cost.image_bytes > cost.checkpointed_image_bytes > 0


def test_published_network_costs_what_the_paper_counts():
    spec = ModelSpec(form="denoiser", network=SongUNetParams(), noise=Noise(), image_shape=(3, 32, 32))
    cost = step_cost(EDM(), spec, num_emas=1, bytes_per_value=2)
    assert cost.parameters == 55_732_739
    assert cost.flops_per_image == pytest.approx(3 * 42.4e9, rel=0.01)


COST = StepCost(
    parameters=1,
    flops_per_image=8,
    forward_flops=2,
    state_bytes=100,
    whole_bytes=20,
    image_bytes=10,
    checkpointed_image_bytes=4,
)


def test_advice_names_the_mildest_change_under_which_a_training_fits():
    train, ect = Train(batch_size=12), ECT()
    whole = COST.peak_bytes(train)
    assert advice(COST, ect, train, whole, "student") is None
    assert "it would with student.train.accumulate=2" in advice(COST, ect, train, whole - 1, "student")
    assert advice(COST, ect, train, whole - 110, "student").endswith("accumulate=12")
    in_both_ways = advice(COST, ect, train, whole - 116, "teacher")
    assert in_both_ways.endswith("teacher.train.accumulate=12 teacher.train.checkpoint_activations=true")
    assert "not even one image at a time" in advice(COST, ect, train, whole - 117, "student")
    assert COST.flops_per_train_image(train.model_copy(update={"accumulate": 2, "checkpoint_activations": True})) == 12


def test_several_devices_split_the_batch_and_shard_the_weights_if_asked():
    train, alone = Train(batch_size=12), COST.peak_bytes(Train(batch_size=12))
    whole = COST.peak_bytes_among(4, train, sharded=False)
    assert whole == alone - 9 * 10 and COST.peak_bytes_among(4, train, sharded=True) == whole - 60
    said = advice(COST, ECT(), train, whole - 60, "student", 4)
    assert said.endswith("it would with the environment variable CM_SHARD=1")
    assert advice(COST, ECT(), train, whole - 60, "student", 4, sharded=True) is None
    assert "not even one image" in advice(COST, SCM(), train, whole - 60, "student", 4), (
        "whose weights are never sharded"
    )
    assert "not even one image" in advice(COST, ECT(), train, whole - 87, "student", 4)
    of_two = COST.peak_bytes_among(2, train, sharded=False)
    said = advice(COST, ECT(), train, of_two - 45, "student", 2)
    assert said.endswith("it would with student.train.accumulate=6"), "sharded weights alone would not do"
    assert advice(COST, ECT(), train, whole - 80, "student", 4, sharded=True).endswith("student.train.accumulate=3")


def test_parts_have_to_divide_the_batch():
    with pytest.raises(ValueError, match="accumulate=5 must divide batch_size=12"):
        Train(batch_size=12, accumulate=5)


@pytest.mark.slow
def test_plan_prints_what_the_trainings_of_a_recipe_cost(capsys):
    assert main(["plan", "digits-cd", "--gpu", "h200", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    teacher, student = planned["trainings"]
    assert (planned["gpu"], teacher["training"], student["training"]) == ("h200", "teacher", "student")
    assert student["flops_per_image"] == pytest.approx(2 * teacher["flops_per_image"], rel=0.05)  # six passes, three
    assert student["advice"] is None


@pytest.mark.slow
def test_plan_reckons_with_the_devices_that_divide_a_training(monkeypatch, capsys):
    def planned(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main(["plan", "digits-cd", "--set", "student.train.batch_size=120", "--gpu", "h200", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["count"], found["trainings"][1]

    (one, alone), (four, shared) = planned(), planned(CM_DEVICES="4")
    assert (one, four) == (1, 4) and shared["images_per_s"] == 4 * alone["images_per_s"]
    (_, sharded) = planned(CM_SHARD="1")
    assert sharded["memory_bytes"] < shared["memory_bytes"] < alone["memory_bytes"]
    monkeypatch.setenv("CM_DEVICES", "7")
    assert main(["plan", "digits-cd"]) == 2
    assert "CM_DEVICES=7: must divide teacher.train.batch_size=" in capsys.readouterr().err


@pytest.mark.slow
def test_a_profiled_training_leaves_a_trace_its_kernels_and_its_speed(tmp_path, monkeypatch):
    monkeypatch.setenv(PROFILE_VARIABLE, str(tmp_path / "profile"))
    recipe = small_recipe("digits-ct", f"student.train.num_steps={SKIPPED + 1 + RECORDED + 1}")
    for stage in ("prepare", "teacher", "base", "student"):
        run_small(stage, recipe, tmp_path)
    folder = tmp_path / "profile" / "student"
    assert "aten::" in (folder / "kernels.txt").read_text()
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    head, *rows = (line.split("\t") for line in (folder / "speed.txt").read_text().splitlines())
    assert head == ["step", "images_per_s"], "on a GPU also share_of_limit and memory_peak_gib"
    assert [int(step) for step, _ in rows] == list(range(1, len(rows) + 1)) and all(float(rate) > 0 for _, rate in rows)


def test_the_option_names_the_folder_of_a_profile_wherever_the_stage_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PROFILE_VARIABLE, "")  # so that what the command sets is undone
    assert main(["stage", "nothing", "--profile", "here"]) == 2
    assert os.environ[PROFILE_VARIABLE] == str(tmp_path / "here")


BENCHMARKS = {
    "train_step": "--channels 8 --blocks 1 --size 8 --batch-size 4 --steps 1 --methods ict --variants fused fp32",
    "sample": "--channels 8 --blocks 1 --size 8 --images 8 --batch-size 8 --variants fused fp32",
    "evaluate": "--images 100 --size 8 --width 8",
    "scaling": "--devices 1 2 --channels 8 --blocks 1 --size 8 --batch-size 4 --steps 1 --images 8 --sample-batch 4",
    "overhead": "--only 'cm --help'",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_run_small_on_any_machine(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *shlex.split(BENCHMARKS[name])]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = json.loads(printed)["rows"]
    assert rows and all(value > 0 for row in rows for key, value in row.items() if key.endswith(("seconds", "/s")))


TINY_SWEEP = """
recipe: digits-cd
set:
  teacher.train.num_steps: 20
  features.num_steps: 20
  student.train: {num_steps: 20, log_every: 10}
  student.evaluate_every: 10
  student.evaluate_images: 50
  sample.num_images: 100
points:
  ect: {student.method: {kind: ect}}
  ict: {student.method: {kind: ict}, sample.teacher_images: 0}
  meanflow: {teacher: null, student.method: {kind: meanflow}}
  broken: {student.method: {kind: ct}, student.train.optimizer: {kind: adam, learning_rate: 1e9}}
"""


@pytest.mark.slow
def test_points_of_a_sweep_run_as_plain_stages_and_what_is_done_does_not_run_again(tmp_path):
    page, folder = tmp_path / "tiny.yaml", tmp_path / "runs"
    page.write_text(TINY_SWEEP)

    def points(*names):
        command = [sys.executable, "-m", "benchmarks.points", str(page), str(folder), "--devices", "0", "1"]
        command += ["--judge", "features.architecture=convmixer"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        found = subprocess.run(
            [*command, "--points", *names], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        return found.returncode, {row["point"]: row for row in map(json.loads, found.stdout.splitlines())}

    code, rows = points("ect", "ict", "meanflow", "broken")
    assert code == 1 and rows.keys() == {"ect", "ict", "meanflow", "broken"} and rows["broken"]["code"] == 1
    for name in ("ect", "ict", "meanflow"):
        assert rows[name]["fid_classifier"]["nfe_1"] > 0 and rows[name]["fid_convmixer"]["nfe_1"] > 0
        assert ("teacher_nfe_35" in rows[name]["fid_convmixer"]) == (name == "ect")
    assert not (folder / "ect" / "teacher").exists() and (folder / "meanflow" / "teacher").exists()
    assert "the loss became nan" in (folder / "broken" / "log.txt").read_text()

    command = [sys.executable, "-m", "benchmarks.results", str(folder), str(tmp_path / "pictures"), "--batch-size=128"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    quality, cost = ({row.split("|")[1].strip(): row for row in rows} for rows in (table[2:5], table[8:11]))
    assert quality.keys() == cost.keys() == {"ect", "ict", "meanflow"} and "not measured" not in "".join(table)
    assert all("| 20 |" in row for row in cost.values())
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"fid-against-minutes.png", "one-call.webp"}

    before = (folder / "ect" / "log.txt").stat().st_mtime_ns, (folder / "shared" / "log.txt").stat().st_mtime_ns
    code, again = points("ect")
    assert code == 0 and again["ect"]["fid_classifier"] == rows["ect"]["fid_classifier"]
    assert before == tuple((folder / name / "log.txt").stat().st_mtime_ns for name in ("ect", "shared"))
