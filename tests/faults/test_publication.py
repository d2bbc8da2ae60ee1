"""kill -9 at random moments of publication: a reader sees the old or the new state, whole, and never a torn one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cm_core.checkpoint import list_states, load_state
from flows.checkpoints import s3_store, store
from flows.storage.bucket import Bucket
from miniature import REPOSITORY
from processes import wait_until
from s3_states import KEY, NAME, URI, head, take_over
from servers import s3_server

pytestmark = pytest.mark.slow
LOCAL_KILLS, S3_KILLS = 20, 10

# Saves and publishes states as fast as it can, each file of one state holding its number.
WRITER = """
import sys
from pathlib import Path
import torch
from cm_core.checkpoint import list_states, save_state
from flows.checkpoints import s3_store
from flows.checkpoints.store import hold_checkpoint

s3_store.LEASE_SECONDS = 2.0
origin, key = Path(sys.argv[1]), sys.argv[2]
with hold_checkpoint(origin, "student", key, lambda: None, print) as held:
    saved = list_states(held.folder)
    step = int(saved[-1].name.removeprefix("step-")) if saved else 0
    print("from", step, flush=True)
    while True:
        step += 1
        save_state(held.folder, step, {f"layer{i}": torch.full((20_000,), step) for i in range(3)}, {"again": step})
        held.publish()
        print("saved", step, flush=True)
"""


def start(origin: Path) -> subprocess.Popen:
    command, env = [sys.executable, "-c", WRITER, str(origin), KEY], {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)


def kill_somewhere(writer: subprocess.Popen, rng: random.Random, ready=lambda: True) -> int:
    """Let it save, kill it at any moment once `ready` holds; return the step from which it had gone on."""
    line = next(line for line in writer.stdout if line.startswith("from"))
    wait_until(ready)
    time.sleep(rng.uniform(0, 0.4))
    os.killpg(writer.pid, signal.SIGKILL)
    writer.wait()
    return int(line.split()[1])


def whole_states(folder: Path) -> list[int]:
    """Return the steps of the states in a folder, after reading every byte of them."""
    found = []
    for path in list_states(folder):
        tensors, values = load_state(path)
        step = values["step"]
        assert path.name == f"step-{step:09d}" and values["again"] == step and len(tensors) == 3
        assert all((tensor == step).all() for tensor in tensors.values())
        found.append(step)
    return found


def test_a_folder_never_shows_a_torn_state(tmp_path, monkeypatch):
    monkeypatch.delenv("CM_STATE", raising=False)
    rng, newest, folder = random.Random(0), 0, store.states_folder(tmp_path) / NAME
    for kill in range(LOCAL_KILLS):
        began = kill_somewhere(start(tmp_path), rng, lambda kill=kill: kill or list_states(folder))
        assert began == newest, "it went on from the newest state"
        newest = max(whole_states(folder), default=0)
        assert newest >= began
    assert newest > 0


def test_a_bucket_never_shows_a_torn_state(tmp_path, monkeypatch):
    monkeypatch.setenv("CM_STATE", URI)
    monkeypatch.setattr(s3_store, "LEASE_SECONDS", 2.0)
    rng, newest = random.Random(1), 0
    with s3_server(monkeypatch, "states") as client:
        for kill in range(S3_KILLS):
            writer = start(tmp_path / f"machine{kill}")  # a new machine each time
            began = kill_somewhere(writer, rng, lambda kill=kill: kill or head(client).states)
            assert began >= newest, "it went on from the newest published state"  # a request under way may arrive late
            newest = _newest_published(tmp_path / f"reader{kill}")
            assert newest >= began
            if newest:
                take_over(client, monkeypatch)
    assert newest > 0


def _newest_published(folder: Path) -> int:
    """Read the newest state as another worker would, without taking the lease."""
    training = s3_store.Training(Bucket(URI).below(NAME), print)
    found = training._bucket.read(s3_store.HEAD)
    training._head = s3_store.Head.of(found.data)
    folder.mkdir()
    training.restore(folder)
    return max(whole_states(folder), default=0)
