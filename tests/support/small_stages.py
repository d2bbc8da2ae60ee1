"""Stages called as plain functions on a few digits, with networks that train in a second."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from flows.monitor import Monitor
from flows.recipes.recipe import load_recipe
from flows.stages.models import write_absent
from flows.stages.training import StageStopped

ROOT = Path(__file__).parents[2]
SMALL = [
    "network={kind: song_unet, channels: 8, channel_mult: [1], num_blocks: 1, attn_resolutions: []}",
    "data.max_images=48",
    "sample.num_images=6",
    "sample.batch_size=4",
    "sample.teacher_images=6",
    "sample.teacher_sampler.num_steps=2",
    "edit.num_images=3",
    "edit.num_steps=2",
]
TRAIN = {"num_steps": 4, "batch_size": 8, "log_every": 1, "save_every": 2, "grid_every": 2}


def small_recipe(name, *overrides):
    for section in ("student", *(() if name == "digits-ct" else ("teacher",))):
        overrides = (*(f"{section}.train.{key}={value}" for key, value in TRAIN.items()), *overrides)
    return load_recipe(name, [*SMALL, *overrides], root=ROOT)


def run_small(stage, recipe, folder, monitor=None, **places):
    """Call a stage with what its signature asks for, as `cm stage` does."""
    function = getattr(import_module(f"flows.stages.{stage}"), stage)
    values = {"out_dir": folder / stage, "state_dir": folder / "state" / stage, "monitor": monitor or Monitor()}
    for name in inspect.signature(function).parameters:
        if name.endswith("_dir") and name not in values:
            values[name] = folder / name.removesuffix("_dir")
        elif name not in values:
            values[name] = getattr(recipe, name)
    values |= places
    if "base_dir" in values and not values["base_dir"].exists():  # as the stage leaves it for a recipe without base
        write_absent(values["base_dir"], "base", Monitor())
    values["out_dir"].mkdir(parents=True, exist_ok=True)
    function(**{name: values[name] for name in inspect.signature(function).parameters})
    return values["out_dir"]


def files(folder):
    """Return {path: bytes} of all files below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class StopAtTwo(Monitor):
    """Asks a training to stop after its second step."""

    seen = 0

    def metrics(self, values, step):
        self.seen = step

    def stop_requested(self):
        return self.seen == 2


def assert_student_resumes_to_the_same_bytes(recipe, folder, **places):
    """Train a student in `folder`/whole, and one that is stopped and goes on in `folder`/stopped."""
    run_small("student", recipe, folder / "whole", **places)
    with pytest.raises(StageStopped, match="stopped after step 2"):
        run_small("student", recipe, folder / "stopped", StopAtTwo(), **places)
    run_small("student", recipe, folder / "stopped", **places)
    assert files(folder / "whole" / "student") == files(folder / "stopped" / "student")
