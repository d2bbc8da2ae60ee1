"""Training killed with SIGKILL at random moments and started again: the artifact is the uninterrupted one, to the byte.

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

from small_stages import files, run_small, small_recipe

# One method for each kind of state beside the weights: none, a target, a teacher that is replaced, a learned weighting.
METHODS = {"ect": "ect", "ct": "ct", "pd": "{kind: pd, start_steps: 8}", "scm": "scm"}
TRAINING = (
    "student.train.num_steps=48",
    "student.train.save_every=3",
    "student.train.grid_every=6",
    "student.train.log_every=3",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder, recipe = tmp_path_factory.mktemp("inputs"), small_recipe("digits-cd")
    for stage in ("prepare", "teacher"):
        run_small(stage, recipe, folder)
    return {f"{stage}_dir": folder / stage for stage in ("prepare", "teacher")}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_training_killed_again_and_again_ends_with_the_same_bytes(inputs, tmp_path, method, request):
    recipe = small_recipe("digits-cd", f"student.method={METHODS[method]}", *TRAINING)
    started = time.monotonic()
    run_in_child(recipe, tmp_path / "whole", inputs).join()
    duration, moments, kills = time.monotonic() - started, random.Random(method), 0
    wanted = max(1, request.config.getoption("--kills") // len(METHODS))
    while kills < wanted:
        child = run_in_child(recipe, tmp_path / "killed", inputs)
        child.join(moments.uniform(0, 0.5 * duration))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:  # it came to its end before: the outputs are lost as well, as when DVC could not store them
            assert child.exitcode == 0
            assert files(tmp_path / "killed" / "student") == files(tmp_path / "whole" / "student")
            shutil.rmtree(tmp_path / "killed")
    last = run_in_child(recipe, tmp_path / "killed", inputs)
    last.join()
    assert last.exitcode == 0
    assert files(tmp_path / "killed" / "student") == files(tmp_path / "whole" / "student")


def run_in_child(recipe, folder, inputs):
    """Start the stage in a process of its own, forked so that nothing has to be imported again."""

    def train():
        torch.set_num_threads(1)
        shutil.rmtree(folder / "student", ignore_errors=True)  # `cm stage` begins with an empty folder
        run_small("student", recipe, folder, **inputs)

    child = multiprocessing.get_context("fork").Process(target=train)
    child.start()
    return child
