"""Two processes train as one: the same numbers to rounding, the same weights in both, and a lost one ends the other."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cm_core import ranks
from cm_core.checkpoint import list_states, load_tensors
from flows.launch import free_port
from flows.recipe import write_active
from miniature import REPOSITORY
from small_stages import files, run_small, small_recipe
from test_loop import METHODS, Training

STEPS = {"num_steps": 12, "batch_size": 8, "log_every": 1, "save_every": 2, "grid_every": 4}


def train(rank, count, port, folder):
    """Train by every method as one of `count` processes, without dropout and with it."""
    torch.set_num_threads(1)
    with ranks.joined(rank, count, port):
        for name, method in METHODS.items():
            for dropout in (0.0, 0.2):
                training = Training(method, dropout=dropout)
                nets = {
                    id(m): m.net for m in (training.models.student, training.models.target, training.models.teacher)
                }
                for net in nets.values():
                    ranks.divide_rows(net)
                seeds = []
                training.models.student.net.register_forward_pre_hook(
                    lambda *_, to=seeds: to.append(torch.initial_seed())
                )
                metrics = list(training.steps())
                torch.save((metrics, training.tensors(), seeds), folder / f"{name}-{dropout}-{rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, spawn, port = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("spawn"), free_port()
    processes = [spawn.Process(target=train, args=(rank, 2, port, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return {path.stem: torch.load(path) for path in folder.iterdir()}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_take_the_steps_of_one(trained, name):
    alone = Training(METHODS[name], dropout=0.0)
    expected, (metrics, tensors, _) = list(alone.steps()), trained[f"{name}-0.0-0"]
    assert [entry.keys() for entry in metrics] == [entry.keys() for entry in expected]
    for found, wanted in zip(metrics, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    for key, tensor in alone.tensors().items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_both_hold_the_same_metrics_and_bits_though_they_drop_different_activations(trained, name):
    for dropout in (0.0, 0.2):
        (metrics, first, seeds), (others, second, other_seeds) = (
            trained[f"{name}-{dropout}-{rank}"] for rank in (0, 1)
        )
        assert metrics == others
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert len(seeds) == len(other_seeds) and not set(seeds) & set(other_seeds)


def test_alone_nothing_is_divided():
    module = torch.nn.Linear(2, 2)
    ranks.divide_rows(module)
    assert "forward" not in vars(module)
    assert ranks.is_first() and ranks.count() == 1
    assert ranks.agree(True) and not ranks.agree(False)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A folder as `cm stage student` finds it: a recipe in force, images and a teacher."""
    root = tmp_path_factory.mktemp("ready")
    recipe = small_recipe("digits-cd", *(f"student.train.{key}={value}" for key, value in STEPS.items()))
    write_active(recipe, root)
    for stage in ("prepare", "teacher"):
        run_small(stage, recipe, root / "out")
    return root


@pytest.fixture
def root(ready, tmp_path):
    shutil.copytree(ready, tmp_path / "root")
    return tmp_path / "root"


def shared_environment(devices):
    here = os.pathsep.join([str(REPOSITORY), str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": here, "CM_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}


def begin(root, devices):
    shutil.rmtree(root / "out" / "student", ignore_errors=True)
    command = [sys.executable, Path(__file__).with_name("shared_training.py"), root]
    return subprocess.Popen(
        command, env=shared_environment(devices), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(root, devices):
    process = begin(root, devices)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def losses(root):
    lines = (root / "out" / "student" / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


@pytest.fixture(scope="module")
def alone(ready, tmp_path_factory):
    root = tmp_path_factory.mktemp("alone") / "root"
    shutil.copytree(ready, root)
    code, output = run(root, 1)
    assert code == 0, output
    return root


def assert_same_training(root, alone):
    assert losses(root) == pytest.approx(losses(alone), rel=1e-3)
    found, wanted = (load_tensors(folder / "out/student/ema.safetensors") for folder in (root, alone))
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-5)
    grids = [sorted(path.name for path in (folder / "out/student/grids").iterdir()) for folder in (root, alone)]
    assert grids[0] == grids[1]


@pytest.mark.slow
def test_a_stage_trained_by_two_writes_what_it_writes_alone(root, alone):
    code, output = run(root, 2)
    assert code == 0, output
    assert_same_training(root, alone)


@pytest.mark.slow
def test_a_lost_process_ends_the_training_which_goes_on_alone_from_its_state(root, alone):
    (root / "states").mkdir()
    (root / "states" / "kill").touch()
    code, output = run(root, 2)
    assert code == 1
    assert output.splitlines()[-1] == (
        "student: process 1 was killed by signal 9; started again, a training goes on from its last saved state"
    )
    saved = int(list_states(root / "states")[-1].name.removeprefix("step-"))
    code, output = run(root, 1)
    assert code == 0 and f"resuming from step {saved}" in output and saved >= 4
    assert_same_training(root, alone)


@pytest.mark.slow
def test_a_stop_reaches_both_after_the_same_step_and_two_go_on(root, alone):
    process = begin(root, 2)
    while process.stdout.readline().strip() != "3":
        pass
    (root / "states" / "stop").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped after step" in output and "lost" not in output
    (root / "states" / "stop").unlink()
    code, output = run(root, 2)
    assert code == 0 and "resuming from step" in output
    assert_same_training(root, alone)


@pytest.mark.slow
def test_the_other_process_ends_with_the_first(root):
    process = begin(root, 2)
    while process.stdout.readline().strip() != "2":
        pass
    (child,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_sample_the_same_bytes(alone, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(alone, root)
    code = (
        "import sys; from pathlib import Path; from flows.launch import several_processes\n"
        "from flows.recipe import load_active; from small_stages import run_small\n"
        "root = Path(sys.argv[1]); recipe = load_active(root)\n"
        "with several_processes('sample', recipe.sample, root): run_small('sample', recipe, root / 'out')"
    )
    made = {}
    for devices in (1, 2):
        shutil.rmtree(root / "out" / "sample", ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-c", code, root], env=shared_environment(devices), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        made[devices] = files(root / "out" / "sample")
    assert made[1] == made[2]
