"""Training killed with SIGKILL at random moments and started again: it goes on after the newest saved state, and the
artifact is the uninterrupted one, to the byte.

By hand, a longer soak: python -m pytest tests/faults/test_kills.py --run-slow --kills 100
"""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

from cm_core.checkpoint import STATE, list_states
from flows.monitor import Monitor
from processes import wait_until
from small_stages import files, run_small, small_recipe

# One method for each kind of state beside the weights: none, a target, a teacher that is replaced, a learned weighting.
METHODS = {"ect": "ect", "ct": "ct", "pd": "{kind: pd, start_steps: 8}", "scm": "scm"}
STEPS, EVERY = 48, 3  # of a training; between states, and between reports
TRAINING = (
    f"student.train.num_steps={STEPS}",
    f"student.train.save_every={EVERY}",
    f"student.train.grid_every={2 * EVERY}",
    f"student.train.log_every={EVERY}",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder, recipe = tmp_path_factory.mktemp("inputs"), small_recipe("digits-cd")
    for stage in ("prepare", "teacher", "base"):
        run_small(stage, recipe, folder)
    return {f"{stage}_dir": folder / stage for stage in ("prepare", "teacher", "base")}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_training_killed_again_and_again_goes_on_and_ends_with_the_same_bytes(inputs, tmp_path, method, request):
    recipe = small_recipe("digits-cd", f"student.method={METHODS[method]}", *TRAINING)
    started = time.monotonic()
    run_in_child(recipe, tmp_path / "whole", inputs).join()
    between = (time.monotonic() - started) * EVERY / STEPS
    moments, kills, resumed = random.Random(method), 0, 0
    killed = tmp_path / "killed"
    wanted = max(1, request.config.getoption("--kills") // len(METHODS))
    while True:
        saved = newest_step(killed)
        child = run_in_child(recipe, killed, inputs)
        if kills < wanted:
            reached = saved + moments.randrange(0, STEPS // 2, EVERY)
            wait_until(lambda: child.exitcode is not None or max(steps(killed), default=0) >= reached, every=0.01)  # noqa: B023
            child.join(moments.uniform(0, 2 * between))
        else:
            child.join()
        ended = child.exitcode
        if ended is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        trained = steps(killed)
        if trained:  # not every start lives for a step
            assert trained == list(range(saved + EVERY, trained[-1] + 1, EVERY)), (
                "only what came after the newest state"
            )
            resumed += saved > 0
        if ended is not None:
            assert ended == 0
            assert files(killed / "student") == files(tmp_path / "whole" / "student")
            if kills == wanted:
                break
            shutil.rmtree(killed)  # the outputs are lost as well, as when DVC could not store them
    assert resumed, "of all starts one at least found a state"


def newest_step(folder):
    """Return the step of the newest saved state; 0 before the first."""
    return max((int(state.name.removeprefix(STATE)) for state in list_states(folder / "state" / "student")), default=0)


def steps(folder):
    """Return the steps that the last start reported: every third."""
    path = folder / "steps"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


class Steps(Monitor):
    """Writes down the steps that are reported."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", buffering=1)

    def progress(self, done, total, unit):
        self._file.write(f"{done}\n")


def run_in_child(recipe, folder, inputs):
    """Start the stage in a process of its own, forked so that nothing has to be imported again."""
    (folder / "steps").unlink(missing_ok=True)

    def train():
        torch.set_num_threads(1)
        shutil.rmtree(folder / "student", ignore_errors=True)  # `cm stage` begins with an empty folder
        run_small("student", recipe, folder, Steps(folder / "steps"), **inputs)
        os._exit(0)  # nothing that an earlier test has left is for this process to end, such as Prefect's threads

    child = multiprocessing.get_context("fork").Process(target=train)
    child.start()
    return child
