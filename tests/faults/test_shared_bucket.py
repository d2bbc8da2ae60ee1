"""Machines that share nothing but a bucket: a training passes from one to the other, and so does a whole flow."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flows.recipes.recipe import load_recipe, write_active
from flows.workspace.dvc_files import dvc_md5, read_stages
from live import cm, environment, make_live_workspace
from miniature import commit, git, two_machines
from processes import wait_until
from servers import aws_variables, shared_s3
from small_stages import files

STEPS, LEASE_SECONDS = 240, 6
TRAINING = {"num_steps": STEPS, "save_every": 20, "log_every": 10, "grid_every": 120}
# `cm stage teacher`, whose lease ends sooner.
TEACHER = f"""
from flows import cli
from flows.checkpoints import s3_store
s3_store.LEASE_SECONDS = {LEASE_SECONDS}.0
cli.main(["stage", "teacher"])
"""


s3 = shared_s3("team")


@pytest.fixture
def aws(s3):
    """The variables with which another process reaches the bucket."""
    return aws_variables()


@pytest.fixture
def machines(tmp_path):
    return two_machines(make_live_workspace(tmp_path / "first"))


def train(root, **variables):
    """Begin to train the teacher; its output is a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", TEACHER],
        cwd=root,
        env=environment(root, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def heard(process, part):
    """Read on until a line has this in it; return it."""
    lines = []
    while line := process.stdout.readline():
        lines.append(line)
        if part in line:
            return line.strip()
    raise AssertionError("".join(lines))


def published_step(s3):
    """Return the step of the newest state in the bucket, 0 before the first."""
    heads = [entry["Key"] for entry in s3.list_objects_v2(Bucket="team").get("Contents", ()) if "head" in entry["Key"]]
    if not heads:
        return 0
    manifests = json.loads(s3.get_object(Bucket="team", Key=heads[0])["Body"].read())["states"]
    prefix = heads[0].removesuffix("head.json")
    if not manifests:
        return 0
    manifest = s3.get_object(Bucket="team", Key=prefix + manifests[0])["Body"].read().decode()
    return max(int(step) for step in re.findall(r"step-(\d+)", manifest))


@pytest.mark.soak
def test_a_killed_training_is_ended_elsewhere_with_the_same_bytes(machines, s3, aws, tmp_path):
    """Uninterrupted on a third machine, killed on the first, gone on with on the second, which has the bucket alone."""
    first, second = machines
    git(tmp_path, "clone", "--quiet", str(first), "third")
    third = tmp_path / "third"
    recipe = load_recipe("tiny", [f"teacher.train.{key}={value}" for key, value in TRAINING.items()], root=first)
    write_active(recipe, first)
    assert cm(first, "stage", "prepare").returncode == 0
    for root in (second, third):
        write_active(recipe, root)
        shutil.copytree(first / "out" / "prepare", root / "out" / "prepare")
    whole = cm(third, "stage", "teacher")
    assert whole.returncode == 0, whole.stderr

    shared = {**aws, "CM_STATE": "s3://team/states"}
    killed = train(first, **shared)
    wait_until(lambda: published_step(s3) >= 20)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    reached = published_step(s3)
    heir = train(second, **shared)
    assert heard(heir, f":{killed.pid} gave no sign for")
    assert 20 <= reached <= int(heard(heir, "resuming from step").rpartition(" ")[2]) < STEPS
    assert heard(heir, f"{STEPS:,} of {STEPS:,} steps") and heir.wait() == 0
    assert files(second / "out" / "teacher") == files(third / "out" / "teacher")
    assert not (first / "out" / "teacher" / "weights.safetensors").exists()


@pytest.fixture
def pictures(tmp_path):
    """Forty images of two colours of noise."""
    rng = np.random.default_rng(0)
    for kind in ("dark", "light"):
        (tmp_path / "pictures" / kind).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 128, (8, 8), dtype=np.uint8) + (128 if kind == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pictures" / kind / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def data(machines, aws, pictures):
    """The override for pictures that the first machine has versioned and pushed, and the second knows through git."""
    first, second = machines
    for root in machines:
        text = "[core]\n    remote = team\n['remote \"team\"']\n    url = s3://team/dvc\n"
        (root / ".dvc" / "config.local").write_text(text)
    added = cm(first, "data", "add", str(pictures), **aws)
    assert "pushed to s3://team/dvc" in added.stdout, added.stderr
    git(first, "add", "--all")
    commit(first)
    git(second, "pull", "--quiet")
    return re.search(r"--set '(.*)'", added.stdout)[1]


@pytest.mark.slow
def test_versioned_data_are_brought_from_the_bucket_and_named(machines, aws, data):
    _, second = machines
    write_active(load_recipe("tiny", [data], root=second), second)
    assert not (second / "data" / "pictures.zip").exists()
    done = cm(second, "stage", "prepare", **aws)
    version = re.search(r"version: (\w{32})", data)[1]
    assert f"data/pictures.zip, version {version}" in done.stderr
    assert dvc_md5(second / "data" / "pictures.zip") == version


@pytest.mark.soak
def test_a_whole_flow_is_found_by_a_machine_that_has_nothing(machines, aws, data):
    run = ("run", "tiny", "--take-over", "--set", data)
    made, found = (cm(root, *run, **aws) for root in machines)
    assert (made.returncode, found.returncode) == (0, 0), made.stderr + found.stderr
    first, second = (re.findall(r"(\w+): (done|cached).*, data version (.*)", done.stderr) for done in (made, found))
    assert {word for _, word, _ in first} == {"done"} and {word for _, word, _ in second} == {"cached"}
    assert {(stage, version) for stage, _, version in first} == {(stage, version) for stage, _, version in second}
    assert {stage for stage, _, _ in first} == set(read_stages(machines[0]))
    assert files(machines[0] / "out") == files(machines[1] / "out")
