"""Two processes train as one: the same numbers to rounding, the same weights in both, and a lost one ends the other."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cm_core.parallel import gradients, graphs, ranks
from cm_core.tensor_files import load_tensors
from cm_core.training.checkpoint import list_states
from cm_core.training.passes import compose_passes
from flows.recipes.recipe import write_active
from miniature import REPOSITORY, SUPPORT, python_path
from servers import free_port
from several import run_in_several
from small_stages import files, run_small, small_recipe
from tiny_training import METHODS, Training

ROUNDING = 1e-4 if torch.cuda.is_available() else 1e-5  # GPUs add in any order: two runs of one process differ too
STEPS = {"num_steps": 12, "batch_size": 8, "log_every": 1, "save_every": 2, "grid_every": 4}
SHARED = ("cd-ema", "pd", "scm")  # between them they have a target, a teacher and a weighting


def begin_training(method, *, steps):
    """Return a training that was stopped after so many steps, between two metrics."""
    training = Training(method, log_every=3, save_every=3, grid_every=3)
    if steps:
        next(training.steps(stop_requested=lambda: training.state.step == steps))
    return training


def train(rank, port, folder):
    """Train by every method as one of two processes, without dropout and with it."""
    torch.set_num_threads(1)
    gradients.BUCKET_BYTES = 1024  # so that gradients go in many pieces
    begun = {name: begin_training(METHODS[name], steps=0 if rank else 2) for name in SHARED}
    with ranks.joined(rank, 2, port):
        for name, training in begun.items():
            training.state.share()
            held = training.tensors() | training.state._window_tensors()
            torch.save((training.state.step, held), folder / f"shared-{name}-{rank}.pt")
        for name, method in METHODS.items():
            for dropout in (0.0, 0.2):
                training = Training(method, dropout=dropout)
                training.models = compose_passes(training.models, method, training.train, graphs=False)
                metrics = list(training.steps())
                torch.save((metrics, training.tensors()), folder / f"{name}-{dropout}-{rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_in_several(train, folder)
    return {path.stem: torch.load(path) for path in folder.iterdir()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_take_the_steps_of_one(trained, name, dropout):
    alone = Training(METHODS[name], dropout=dropout)
    expected, (metrics, tensors) = list(alone.steps()), trained[f"{name}-{dropout}-0"]
    assert [entry.keys() for entry in metrics] == [entry.keys() for entry in expected]
    for found, wanted in zip(metrics, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    for key, tensor in alone.tensors().items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_both_hold_the_same_metrics_and_bits(trained, name):
    for dropout in (0.0, 0.2):
        (metrics, first), (others, second) = (trained[f"{name}-{dropout}-{rank}"] for rank in (0, 1))
        assert metrics == others
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", SHARED)
def test_all_hold_the_state_of_the_first_to_the_bit(trained, name):
    training = begin_training(METHODS[name], steps=2)
    expected = training.tensors() | training.state._window_tensors()
    (step, first), (other_step, second) = (trained[f"shared-{name}-{rank}"] for rank in (0, 1))
    assert step == other_step == 2 and first.keys() == second.keys() == expected.keys()
    assert all(torch.equal(first[key], second[key]) for key in expected)
    for key, tensor in expected.items():  # computed by as many threads as there are: not the same bits
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=1e-5)


def test_alone_nothing_is_divided():
    assert ranks.is_main() and ranks.world_size() == 1
    assert ranks.agree(True) and not ranks.agree(False)


def test_gradients_come_in_pieces_as_the_backward_pass_computes_them(monkeypatch):
    net = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))  # 288 bytes a layer
    net(torch.ones(2, 8)).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 300)
    sent = []
    pieces = gradients.GradientBuckets(lambda piece: sent.append((piece, net[0].weight.grad)))
    with pieces.taken_from(net.parameters()):
        net(torch.ones(2, 8)).square().sum().backward()
    assert len(sent) == 2 and all(first is None for _, first in sent)  # the first layer's gradient comes last
    found = [piece for piece, _ in sent] + [pieces.rest()]
    assert all(piece.nbytes >= 300 for piece in found[:-1]) and pieces.rest() is None
    for p, gradient in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)
    for piece in found:
        piece.mul_(2)  # a sum in its place is the gradient
    assert all(torch.equal(p.grad, 2 * gradient) for p, gradient in zip(net.parameters(), expected, strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_of_half_precision_stand_ins_become_those_of_the_parameters(processes, monkeypatch):
    conv, norm = torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4)
    net = torch.nn.Sequential(conv, norm, torch.nn.Conv2d(4, 3, 1)).to(memory_format=torch.channels_last)
    x, parameters = torch.randn(2, 2, 5, 4), list(net.parameters())
    casting = graphs._CastWeights(net, torch.bfloat16)
    with torch.no_grad():
        conv.weight.mul_(2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad(net(x).float().square().sum(), parameters)
        with casting.in_place():
            casting.update()
            out = net(x)
    assert list(net.parameters()) == parameters
    monkeypatch.setattr(ranks, "world_size", lambda: processes)
    stand_ins, pieces = casting.stand_ins, gradients.GradientBuckets(lambda piece: None)
    assert set(stand_ins) == {conv.weight, net[2].weight}
    with pieces.taken_from(parameters, stand_ins):
        out.float().square().sum().backward(inputs=[stand_ins.get(p, p) for p in parameters])
    last = pieces.rest()
    assert last is None if processes == 1 else len(last) == sum(p.numel() for p in parameters)
    for p, gradient in zip(parameters, expected, strict=True):
        assert torch.equal(p.grad, gradient) and p.grad.stride() == p.stride() and p.grad.dtype == torch.float32


class Recorded:
    """A recorded pass whose backward pass is still to come; a GPU's would be graphs."""

    awaits_backward = True

    def __init__(self, forward, parameters, args, casting):
        self._forward = forward

    def forward(self, args):
        return self._forward(*args).detach()


def test_a_shared_network_refuses_a_second_pass_with_gradients_beside_a_recorded_one(monkeypatch):
    monkeypatch.setattr(graphs, "fuses", lambda x: True)
    monkeypatch.setattr(graphs, "_Pass", Recorded)
    net, x = torch.nn.Linear(2, 2), torch.ones(2, 2)
    replayed = graphs.with_cuda_graphs(net)
    replayed(x)  # the first of its kind runs plainly
    replayed(x)  # recorded
    replayed(x)  # alone, it is taken and this one runs plainly again
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="one pass at a time"):
        replayed(x)
    with torch.no_grad():
        assert torch.equal(replayed(x), torch.nn.functional.linear(x, net.weight, net.bias))


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
    return {**os.environ, "PYTHONPATH": python_path(REPOSITORY), "CM_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}


def begin(root, devices, stage="student", **variables):
    shutil.rmtree(root / "out" / stage, ignore_errors=True)
    command = [sys.executable, SUPPORT / "shared_training.py", root, stage]
    environment = shared_environment(devices) | variables
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process):
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def run(root, devices, stage="student", **variables):
    return end(begin(root, devices, stage, **variables))


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
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=ROUNDING)
    grids = [sorted(path.name for path in (folder / "out/student/grids").iterdir()) for folder in (root, alone)]
    assert grids[0] == grids[1]


@pytest.mark.slow
@pytest.mark.parametrize("divides", ["0", "1"])
def test_a_stage_trained_by_two_writes_what_it_writes_alone(root, alone, divides):
    code, output = run(root, 2, CM_SHARD=divides)
    assert code == 0, output
    assert_same_training(root, alone)


@pytest.mark.slow
@pytest.mark.parametrize("divides", ["0", "1"])
def test_a_lost_process_ends_the_training_which_goes_on_alone_from_its_state(root, alone, divides):
    (root / "states").mkdir()
    (root / "states" / "kill").touch()
    code, output = run(root, 2, CM_SHARD=divides)
    assert code == 1
    line = "student: process 1 was killed by signal 9; started again, a training goes on from its last saved state"
    assert line in output.splitlines()  # on GPUs, PyTorch adds what it thinks of it
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


@pytest.fixture(scope="module")
def sampled(alone):
    """What one process samples."""
    code, output = run(alone, 1, "sample")
    assert code == 0, output
    return files(alone / "out" / "sample")


@pytest.mark.slow
def test_two_processes_sample_the_same_bytes(alone, sampled, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(alone, root)
    code, output = run(root, 2, "sample")
    assert code == 0, output
    assert files(root / "out" / "sample") == sampled


class Node:
    """A workspace with nothing but code, recipe and inputs: one of two, which share no file."""

    def __init__(self, folder, made, port):
        self.root = folder
        for name in ("cm_core", "flows"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "dvc.yaml", folder)
        for name in ("params", "out"):
            shutil.copytree(made / name, folder / name)
        self.variables = {"PYTHONPATH": python_path(folder), "CM_MEET": f"127.0.0.1:{port}"}

    def begin(self, stage="student"):
        return begin(self.root, 1, stage, **self.variables, CM_NODES="2")

    def join(self, stage="student"):
        command, environment = [sys.executable, "-m", "flows.cli", "join", stage], shared_environment(1)
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment | self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def two_nodes(folder, made):
    port = free_port()
    return [Node(folder / name, made, port) for name in ("main", "other")]


def run_together(main, other, stage="student"):
    processes = main.begin(stage), other.join(stage)
    return [end(process) for process in processes]


@pytest.fixture(scope="module")
def broken(ready, tmp_path_factory):
    """Two nodes whose training ended because the second's process was killed; and what they said."""
    main, other = two_nodes(tmp_path_factory.mktemp("broken"), ready)
    processes = main.begin(), other.join()
    while processes[0].stdout.readline().strip() != "5":
        pass
    joined = processes[1].pid
    (child,) = map(int, Path(f"/proc/{joined}/task/{joined}/children").read_text().split())
    os.kill(child, signal.SIGKILL)
    return main, other, [end(process) for process in processes]


@pytest.mark.slow
def test_a_process_lost_on_another_node_ends_both_with_one_line(broken):
    main, other, [(code, output), (other_code, other_output)] = broken
    lost = "student: process 1 was killed by signal 9"
    assert code == 1
    assert f"{lost}; started again, a training goes on from its last saved state" in output.splitlines()
    assert other_code == 1
    assert other_output.splitlines()[-1] == f"cm: {lost}"
    assert "Traceback" not in output + other_output
    assert list((main.root / "states").glob("step-*")) and not (other.root / "states").exists()
    assert not list((other.root / ".cm").rglob("step-*")) and not (other.root / "out" / "student").exists()


@pytest.mark.slow
def test_what_two_nodes_began_goes_on_alone(broken, alone, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(broken[0].root, root)
    code, output = run(root, 1)
    assert code == 0 and "resuming from step" in output
    assert_same_training(root, alone)


@pytest.mark.slow
def test_two_nodes_go_on_from_a_state_of_the_main_node_alone_and_sample_the_same_bytes(broken, alone, sampled):
    main, other, _ = broken
    (code, output), (other_code, other_output) = run_together(main, other)
    assert code == 0 and "resuming from step" in output
    assert other_code == 0 and other_output.splitlines()[-1] == "student: done"
    assert_same_training(main.root, alone)
    for node in (main, other):
        shutil.copytree(alone / "out" / "student", node.root / "out" / "student", dirs_exist_ok=True)
    (code, output), (other_code, other_output) = run_together(main, other, "sample")
    assert (code, other_code) == (0, 0), output + other_output
    assert files(main.root / "out" / "sample") == sampled and not (other.root / "out" / "sample").exists()


@pytest.mark.slow
def test_a_node_with_another_recipe_is_refused_on_both(ready, tmp_path):
    main, other = two_nodes(tmp_path, ready)
    recipe = small_recipe("digits-cd", *(f"student.train.{key}={value}" for key, value in STEPS.items()), "seed=7")
    write_active(recipe, other.root)
    (code, output), (other_code, other_output) = run_together(main, other)
    line = f"student: seed is 7 on node 1 ({socket.gethostname()}) and 0 on the main node; all must compute the same"
    assert (code, output.splitlines()[-1]) == (1, line)  # `cm stage` says it with exit code 2, as `cm join` does
    assert (other_code, other_output.splitlines()[-1]) == (2, f"cm: {line}")
