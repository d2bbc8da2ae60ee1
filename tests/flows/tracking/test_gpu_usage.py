"""GPU-hours and energy: read from the cards' counters, summed up the tree of runs, listed by person and recipe."""

import json
from types import SimpleNamespace

import pynvml
import pytest

from command import run
from flows.tracking.gpu_usage import ENERGY, GPU_HOURS, GpuUsage, summed
from flows.tracking.person import USER, person
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import Tracker
from miniature import git, make_workspace
from processes import wait_until

KWH = 3_600_000_000  # in millijoules


@pytest.fixture
def cards(monkeypatch):
    """NVML's two cards, whose counters a test moves; "MIG-1" is a part of a card and has none."""
    counters = {0: 7 * KWH, 1: 0, "GPU-b": 0}

    def read(handle):
        if handle not in counters:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return counters[handle]

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", read)
    return counters


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("flows.tracking.gpu_usage.time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_energy_is_the_difference_of_the_devices_own_counters(cards, clock):
    usage = GpuUsage(["0", "GPU-b"])
    cards[0] += KWH
    cards[1] += 50 * KWH  # another stage's card
    cards["GPU-b"] += KWH // 2
    clock.seconds += 1800
    assert usage.read() == {GPU_HOURS: 1.0, ENERGY: 1.5}


def test_what_is_not_measured_is_not_reported(cards, clock):
    usages = [GpuUsage([]), GpuUsage(["MIG-1"]), GpuUsage(["0"], nodes=2)]
    clock.seconds += 3600
    assert [usage.read() for usage in usages] == [{}, {GPU_HOURS: 1.0}, {GPU_HOURS: 2.0}]


def test_a_machine_without_gpus_has_neither(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert GpuUsage.of_stage(needs_gpu=True).read() == {}


def test_a_stage_has_as_many_devices_as_processes(cards, clock, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    alone, no_gpu = GpuUsage.of_stage(needs_gpu=True), GpuUsage.of_stage(needs_gpu=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = GpuUsage.of_stage(needs_gpu=True)
    clock.seconds += 3600
    assert (alone.read()[GPU_HOURS], no_gpu.read(), shared.read()) == (1.0, {}, {GPU_HOURS: 4.0})


def test_sums_lack_the_energy_if_one_of_them_does():
    with_energy, without = {GPU_HOURS: 1.0, ENERGY: 2.0, "loss": 3.0}, {GPU_HOURS: 1.0}
    assert summed([with_energy, with_energy, {"loss": 1.0}]) == {GPU_HOURS: 2.0, ENERGY: 4.0}
    assert summed([with_energy, without]) == {GPU_HOURS: 2.0}
    assert summed([{"loss": 1.0}]) == {}


def test_runs_are_booked_to_recipes_and_people(tmp_path, cards, clock, monkeypatch, capsys):
    """The stages' metrics reach their pipeline, also if it failed; `cm runs` filters, sorts and sums by them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    ids = {}
    for recipe, user, hours in (("big", "ada", 2), ("small", "ada", 1), ("big", "bob", 3)):
        tags = {"recipe": recipe, USER: user}
        with pytest.raises(KeyError), PipelineRun(Tracker(tmp_path), recipe, tags, {"seed": hours}) as parent:
            for stage, device in (("teacher", "0"), ("evaluate", None)):
                usage = GpuUsage([device] if device else [])
                with StageRun(tmp_path, stage, parent.run_id, lambda tags=tags: tags, usage=usage):
                    clock.seconds += 3600 * hours
                    cards[0] += KWH // 2
            parent.log_results({"nfe_1/fid": 10.0 - hours}, {})
            raise KeyError("failed after all that")
        ids[recipe, user] = parent.run_id

    def listed(*options):
        found = json.loads(run(capsys, "runs", "--json", *options)[1])
        return [(one["recipe"], one["user"], one["gpu_hours"], one["energy_kwh"]) for one in found]

    every = [("small", "ada", 1.0, 0.5), ("big", "ada", 2.0, 0.5), ("big", "bob", 3.0, 0.5)]
    assert listed("--sort", "gpu_hours") == every
    assert listed("--sort", "nfe_1/fid") == every[::-1]
    assert listed("--sort", "gpu_hours", "--descending", "--max", "1") == every[2:]
    assert listed("--where", "user=ada", "--where", "gpu_hours > 1") == every[1:2]
    assert listed("--where", "nfe_1/fid<8.5", "--sort", "gpu_hours") == every[1:]
    assert listed("--where", "seed=1", "--where", "status=failed") == every[:1]
    assert listed("--where", "started<2001-01-01") == []

    sums = json.loads(run(capsys, "runs", "--sum", "user", "--json")[1])
    assert [(one["user"], one["runs"], one["gpu_hours"], one["energy_kwh"]) for one in sums] == [
        ("ada", 2, 3.0, 1.0),
        ("bob", 1, 3.0, 0.5),
    ]
    table = [line.split() for line in run(capsys, "runs", "--sum", "recipe")[1].splitlines()]
    assert [row[:2] + row[3:] for row in table if row[:1] in (["big"], ["small"])] == [
        ["big", "2", "5.000", "1.000"],
        ["small", "1", "1.000", "0.5000"],
    ]
    for words, options in (
        ("expected KEY=VALUE", ("--where", "user")),
        ("'much' is not a number", ("--where", "gpu_hours>much")),
        ("'soon' is not a date", ("--where", "started>soon")),
        ("compared by = or !=", ("--where", "seed>3")),
        ("no key of runs", ("--sort", "a`b")),
    ):
        code, _, err = run(capsys, "runs", *options)
        assert code == 2 and words in err and err.count("\n") == 1


def test_without_gpus_the_list_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    with PipelineRun(Tracker(tmp_path), "one", {"recipe": "one"}, {}) as parent:
        with StageRun(tmp_path, "teacher", parent.run_id, dict, usage=GpuUsage([])):
            pass
    assert "not measured" in run(capsys, "runs")[1] and "not measured" in run(capsys, "runs", "--sum", "recipe")[1]


def test_a_killed_parent_gets_what_its_stages_have_booked(tmp_path, cards, clock, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(tmp_path)
    parent = tracker.start_run("killed", {"prefect.flow_run_id": "f"}, command="", parent_run_id=None)
    with StageRun(tmp_path, "teacher", parent, dict, usage=GpuUsage(["0"])):
        clock.seconds += 3600
    tracker.kill_runs("prefect.flow_run_id", "f")
    assert tracker.client.get_run(parent).data.metrics == {GPU_HOURS: 1.0, ENERGY: 0.0}


def test_a_stage_books_before_it_ends(tmp_path, cards, clock, monkeypatch):
    """What a killed process has used is known up to the last minute."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("flows.tracking.stage_run.USAGE_EVERY", 0.0)
    tracker = Tracker(tmp_path)
    with StageRun(tmp_path, "teacher", None, dict, usage=GpuUsage(["0"])) as stage:
        clock.seconds += 3600
        stage.metrics({"loss": 1.0}, 1)

        def booked():
            found = tracker.client.search_runs([tracker.experiment_id])
            return found and GPU_HOURS in found[0].data.metrics and found[0]

        run = wait_until(booked)
        assert run.data.metrics[GPU_HOURS] == 1.0 and run.info.status == "RUNNING"


def test_the_person_is_named_by_the_best_that_is_known(tmp_path, monkeypatch):
    root = make_workspace(tmp_path)
    git(root, "config", "user.email", "ada@example.org")
    for name in ("CM_USER", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "account")
    assert person(root)[USER] == "account" and person(root)["git.user"] == "ada@example.org"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "login")
    assert person(root)[USER] == "login"
    monkeypatch.setenv("CM_USER", "said")
    assert person(root)[USER] == "said"
