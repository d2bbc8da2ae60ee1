"""infra/smoke.sh: the image, the topology of compose.yaml, a real container stopped in mid-training."""

import os
import shutil
import subprocess

import pytest

from miniature import REPOSITORY

COMPOSE = {"docker": "docker compose", "podman": "podman-compose"}


def engine():
    """The engine for containers that answers and has its compose; None without."""
    for name, compose in COMPOSE.items():
        commands = ([name, "info"], [*compose.split(), "version"])
        if all(shutil.which(one[0]) and not subprocess.run(one, capture_output=True).returncode for one in commands):
            return name
    return None


@pytest.mark.soak
def test_the_topology_starts_and_a_stopped_worker_loses_nothing():
    name = engine()
    if name is None:
        pytest.skip(
            "no container engine: neither docker with its plugin compose nor podman with podman-compose answers"
        )
    command, variables = [REPOSITORY / "infra" / "smoke.sh"], {"ENGINE": name, "COMPOSE": COMPOSE[name]}
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-4000:]}"
    assert ended.stdout.rstrip().endswith("passed")
