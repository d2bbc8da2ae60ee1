"""Stages in several processes: `cm stage` as launcher on one machine, a torchrun on each of two nodes.

They compute what one process does; a process that is lost, differs or is asked to end ends all, and none is left.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager

import psutil
import pytest
import torch

from cm_core.checkpoint import list_states, load_tensors
from flows.recipes.recipe import write_active
from miniature import REPOSITORY, python_path
from processes import WAIT, runs, wait_until
from servers import free_port
from small_stages import files, run_small, small_recipe

pytestmark = pytest.mark.slow
ROUNDING = 1e-4 if torch.cuda.is_available() else 1e-5  # GPUs add in any order: two runs of one process differ too
STEPS = {"num_steps": 30, "batch_size": 8, "log_every": 1, "save_every": 2, "grid_every": 10}
# The first state holds the training up while this file exists, so that it is not over before a test looks at it.
HELD = "held"
HOLDING = f"""
import time
_save_state = save_state

def save_state(*args, **options):
    _save_state(*args, **options)
    while Path("{HELD}").exists():
        time.sleep(0.05)
"""
RESUME = "started again, a training resumes from its last saved state"


def recipe(*overrides):
    return small_recipe("digits-cd", *(f"student.train.{key}={value}" for key, value in STEPS.items()), *overrides)


class Node:
    """A workspace with nothing but code, recipe and inputs; nodes share no file."""

    def __init__(self, root, made):
        self.root = root
        for name in ("cm_core", "flows"):
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        with (root / "cm_core" / "checkpoint.py").open("a") as file:
            file.write(HOLDING)
        for name in ("params", "out"):
            shutil.copytree(made / name, root / name)
        (root / ".dvc").mkdir()
        for name in ("dvc.yaml", ".dvc/config"):
            shutil.copy(REPOSITORY / name, root / name)

    def start(self, *command, **variables):
        shutil.rmtree(self.root / "out" / command[-1], ignore_errors=True)
        shared = {"PYTHONPATH": python_path(self.root), "OMP_NUM_THREADS": "1", "CM_RUN_TAGS": '{"recipe": "small"}'}
        environment = {**os.environ, **shared, **variables}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([sys.executable, "-m", *command], cwd=self.root, env=environment, text=True, **pipes)

    def stage(self, name, devices, **variables):
        return self.start("flows.cli", "stage", name, CM_DEVICES=str(devices), **variables)

    def states(self):
        return [state for folder in self.root.glob(".cm/states/student-*") for state in list_states(folder)]

    def losses(self):
        lines = (self.root / "out" / "student" / "metrics.jsonl").read_text().splitlines()
        return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def torchrun(nodes, stage="student"):
    """Start a torchrun for two processes on each of the nodes."""
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1")
    size = (f"--nnodes={len(nodes)}", "--nproc-per-node=2")
    worker = ("-m", "flows.stage_runner.worker", stage)
    return [node.start("torch.distributed.run", *size, *meeting, *worker) for node in nodes]


def end(process):
    output, _ = process.communicate()
    return process.returncode, output


@contextmanager
def in_mid_training(node, start):
    """Start a training, wait until it has saved a state, and yield its launchers, and the process of each rank.

    The training goes on when the block ends.
    """
    (node.root / HELD).touch()
    processes = start()
    wait_until(lambda: node.states() or any(process.poll() is not None for process in processes))
    children = [child for process in processes for child in psutil.Process(process.pid).children()]
    try:
        yield processes, {int(child.environ()["RANK"]): child for child in children}
    finally:
        (node.root / HELD).unlink()


def assert_none_left(ranks):
    wait_until(lambda: not any(runs(child.pid) for child in ranks.values()))


def assert_same_training(node, alone):
    assert node.losses() == pytest.approx(alone.losses(), rel=1e-3)
    found, wanted = (load_tensors(one.root / "out/student/ema.safetensors") for one in (node, alone))
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=ROUNDING)
    grids = [sorted(path.name for path in (one.root / "out/student/grids").iterdir()) for one in (node, alone)]
    assert grids[0] == grids[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as `cm stage student` finds it: a recipe in force, images and a teacher."""
    root = tmp_path_factory.mktemp("made")
    write_active(recipe(), root)
    for stage in ("prepare", "teacher", "base"):
        run_small(stage, recipe(), root / "out")
    return root


@pytest.fixture
def node(made, tmp_path):
    return Node(tmp_path / "node", made)


@pytest.fixture
def nodes(made, tmp_path):
    return [Node(tmp_path / name, made) for name in ("main", "other")]


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    node = Node(tmp_path_factory.mktemp("alone") / "node", made)
    code, output = end(node.stage("student", 1))
    assert code == 0, output
    return node


def go_on(node, process, alone):
    """Let the training go on from its state; it must end as if it had never been interrupted."""
    code, output = end(process)
    assert code == 0 and "resuming from step" in output, output
    assert_same_training(node, alone)


@pytest.mark.parametrize("shards", ["0", "1"])
def test_two_processes_make_what_one_makes(node, alone, shards):
    code, output = end(node.stage("student", 2, CM_SHARD=shards))
    assert code == 0, output
    assert_same_training(node, alone)


@pytest.mark.parametrize("shards", ["0", "1"])
def test_a_lost_process_is_named_and_one_goes_on_from_the_state(node, alone, shards):
    with in_mid_training(node, lambda: [node.stage("student", 2, CM_SHARD=shards)]) as ((process,), ranks):
        ranks[1].kill()
    code, output = end(process)
    assert code == 1 and f"cm: student: rank 1 was killed by signal 9; {RESUME}" in output.splitlines()
    assert "Traceback" not in output
    assert_none_left(ranks)
    go_on(node, node.stage("student", 1), alone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_after_the_same_step_and_four_on_two_nodes_go_on(nodes, alone, number):
    main, _ = nodes
    with in_mid_training(main, lambda: [main.stage("student", 2)]) as ((process,), ranks):
        process.send_signal(number)
    code, output = end(process)
    assert code == 128 + number and "stopping after this step" in output and "lost" not in output
    assert_none_left(ranks)
    torchruns = torchrun(nodes)
    go_on(main, torchruns[0], alone)
    assert end(torchruns[1])[0] == 0
    assert not nodes[1].states() and not (nodes[1].root / "out" / "student").exists()


def test_a_stage_whose_flow_is_gone_saves_and_ends(node):
    with in_mid_training(node, lambda: [node.stage("student", 2, CM_LIFELINE="stdin")]) as ((process,), ranks):
        process.stdout.close()
        process.stdin.close()
    assert process.wait(WAIT) == 128 + signal.SIGTERM
    assert_none_left(ranks)
    assert int(node.states()[-1].name.removeprefix("step-")) < STEPS["num_steps"]


def test_processes_stop_in_order_when_their_launcher_is_killed(node):
    write_active(recipe("student.train.num_steps=100000"), node.root)
    with in_mid_training(node, lambda: [node.stage("student", 2)]) as ((process,), ranks):
        process.kill()
    assert_none_left(ranks)
    with closing(sqlite3.connect(node.root / "mlflow.db")) as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("KILLED",)], "RUNNING where it just ended"


def test_two_processes_sample_the_same_bytes_as_four_on_two_nodes_and_one(nodes, alone):
    drawn = []
    for start in (
        lambda: [alone.stage("sample", 1)],
        lambda: [nodes[0].stage("sample", 2)],
        lambda: torchrun(nodes, "sample"),
    ):
        for node in nodes:
            shutil.copytree(alone.root / "out" / "student", node.root / "out" / "student", dirs_exist_ok=True)
        for code, output in [end(process) for process in start()]:
            assert code == 0, output
        drawn.append(files((nodes[0] if drawn else alone).root / "out" / "sample"))
    assert drawn[0] == drawn[1] == drawn[2]
    assert not (nodes[1].root / "out" / "sample").exists()


def test_a_rank_lost_on_another_node_is_named_on_both_and_one_goes_on(nodes, alone):
    with in_mid_training(nodes[0], lambda: torchrun(nodes)) as (torchruns, ranks):
        assert len(ranks) == 4
        ranks[3].kill()
    for code, output in [end(process) for process in torchruns]:
        assert code == 1
        line = f"cm: student: lost rank 3 ({socket.gethostname()}); {RESUME}"
        assert output.splitlines().count(line) == 1
    assert_none_left(ranks)
    go_on(nodes[0], nodes[0].stage("student", 1), alone)


def test_a_signal_to_one_node_ends_all_after_the_same_step_and_one_goes_on(nodes, alone):
    with in_mid_training(nodes[0], lambda: torchrun(nodes)) as (torchruns, ranks):
        torchruns[1].terminate()
    for code, output in [end(process) for process in torchruns]:
        assert code and "lost" not in output
    assert_none_left(ranks)
    go_on(nodes[0], nodes[0].stage("student", 1), alone)


def differing_recipe(node):
    write_active(
        small_recipe("digits-cd", *(f"student.train.{key}={value}" for key, value in STEPS.items()), "seed=7"),
        node.root,
    )


def differing_code(node):
    with (node.root / "cm_core" / "model.py").open("a") as file:
        file.write("# an edit\n")


def missing_input(node):
    shutil.rmtree(node.root / "out" / "prepare")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (differing_recipe, "student: seed is 7 on rank 2 ({host}) and 0 on rank 0 ({host}); all must compute the same"),
        (differing_code, "student: cm_core/model.py is "),
        (missing_input, "student: rank 2 ({host}): {root}/out/prepare: missing; "),
    ],
)
def test_nodes_that_differ_end_with_one_line_before_anything_is_trained(nodes, change, said):
    change(nodes[1])
    said = said.format(host=socket.gethostname(), root=nodes[1].root)
    for code, output in [end(process) for process in torchrun(nodes)]:
        ours = [line for line in output.splitlines() if line.startswith("cm: ")]
        assert code == 1 and len(ours) == 1 and ours[0].startswith(f"cm: {said}")
    assert not nodes[0].states()


def test_what_a_process_refuses_is_said_once(node):
    shutil.rmtree(node.root / "out" / "prepare")
    code, output = end(node.stage("student", 2))
    assert (code, output.splitlines()) == (
        2,
        [f"cm: {node.root}/out/prepare: missing; bring its stage up to date with `dvc repro`"],
    )
