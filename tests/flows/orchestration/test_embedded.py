"""Prefect inside a process, whatever Prefect's profile and the proxies of the user say."""

import os
import subprocess
import sys

import pytest

from servers import free_port

HEALTH = """
import sys
from pathlib import Path
from flows.environment import adopt
adopt()
from flows.orchestration.embedded import embedded_prefect
from prefect.client.orchestration import get_client
from prefect.server.api.server import SubprocessASGIServer
SubprocessASGIServer.find_available_port = None  # it probes a port and lets it go again
with embedded_prefect(Path(sys.argv[1])), get_client(sync_client=True) as client:
    print(client.api_healthcheck(), client.api_url)
"""


@pytest.mark.slow
def test_a_profile_without_a_server_a_dead_proxy_and_settings_of_other_servers_do_not_matter(tmp_path):
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "profiles.toml").write_text('active = "default"\n\n[profiles.default]\n')  # by Prefect 2
    dead = f"http://127.0.0.1:{free_port()}"
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env = {**theirs, "HOME": str(tmp_path), "HTTP_PROXY": dead, "http_proxy": dead}
    env |= {"PREFECT_SERVER_API_BASE_PATH": "/elsewhere", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"}
    env |= {"PREFECT_API_DATABASE_CONNECTION_URL": "foo", "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false"}
    command = [sys.executable, "-c", HEALTH, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("None http://127.0.0.1:"), done.stderr
    assert (tmp_path / ".cm" / "prefect" / "prefect.db").is_file()


HISTORY = """
import sys
from pathlib import Path
from flows.orchestration.embedded import embedded_prefect
from prefect.client.orchestration import get_client
for root in map(Path, sys.argv[1:]):
    with embedded_prefect(root), get_client(sync_client=True) as client:
        print(root.name, *sorted(flow.name for flow in client.read_flows()))
        client.create_flow_from_name(f"of-{root.name}")
"""


@pytest.mark.slow
def test_workspaces_of_one_process_have_each_its_own_history(tmp_path):
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-c", HISTORY, *(tmp_path / name for name in ("first", "second", "first"))]
    done = subprocess.run(command, env={**theirs, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["first", "second", "first of-first"], done.stderr
