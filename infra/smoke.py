"""The steps of smoke.sh that talk to the Prefect server, from a container that may: `smoke.py STEP [RUN]`."""

import base64
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId, LogFilter

MINUTES = 20  # for each step
TRAINED = 5  # per cent of the student's steps before the worker is stopped


def submit(client: SyncPrefectClient) -> str:
    """Start a run; return its id."""
    return str(client.create_flow_run_from_deployment(client.read_deployment_by_name("consistency/smoke").id).id)


def trains(client: SyncPrefectClient, run: UUID) -> str:
    """Wait until the student is in mid-training."""
    chosen = {"artifact_filter": ArtifactFilter(key=ArtifactFilterKey(any_=["progress-student"])), **_of(run)}

    def enough(_: str) -> list[float]:
        return [one.data for one in client.read_artifacts(**chosen) if (one.data or 0) > TRAINED]

    return f"the student is at {max(_wait(client, run, enough)):.0f} %"


def crashed(client: SyncPrefectClient, run: UUID) -> str:
    """Wait until the server will start the run again."""
    _wait(client, run, lambda state: state == "AwaitingRetry")
    names = _states(client, run)
    assert "Crashed" in names, names
    return "states: " + ", ".join(names)


def resumed(client: SyncPrefectClient, run: UUID) -> str:
    """Wait for the run's end; see that the second worker had what the first had made, and went on where it stopped."""
    tasks = _completed(client, run)
    assert client.read_flow_run(run).run_count == 2
    for stage in ("prepare", "features", "teacher"):
        assert "Cached" in tasks[stage], tasks
    said = [log.message for log in client.read_logs(LogFilter(flow_run_id={"any_": [run]}), limit=200)]
    (line,) = [line for line in said if "resuming from step" in line]
    return f"{line}; of the first worker it had {[stage for stage in tasks if 'Cached' in tasks[stage]]}"


def cached(client: SyncPrefectClient, run: UUID) -> str:
    """Wait for the end of a run that repeats one; see that nothing was computed."""
    tasks = _completed(client, run)
    assert all(states == {"Cached"} for states in tasks.values()), tasks
    return f"the same run again: all {len(tasks)} stages Cached"


def metrics(_: SyncPrefectClient) -> str:
    """Ask for the metrics as Prometheus does: both servers and the bucket answer, the runs are counted."""
    request = urllib.request.Request("http://metrics:9464/metrics")
    login = f"cm:{Path('/run/secrets/metrics_password').read_text()}".encode()
    request.add_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
    deadline = time.monotonic() + 60 * MINUTES
    while True:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
        silent = [name for name, value in found.items() if name.startswith("cm_source_up") and value != "1.0"]
        ended = found.get('cm_runs_total{recipe="smoke",status="finished"}')
        if ended and not silent:
            return f"metrics: {len(found)} samples, all sources answer, runs that finished: {ended}"
        assert time.monotonic() < deadline, found
        time.sleep(5)


def _completed(client: SyncPrefectClient, run: UUID) -> dict[str, set[str]]:
    _wait(client, run, lambda state: state == "Completed")
    ended: dict[str, set[str]] = {}
    for task in client.read_task_runs(**_of(run)):
        ended.setdefault(task.name, set()).add(task.state_name)
    return ended


def _of(run: UUID) -> dict[str, Any]:
    return {"flow_run_filter": FlowRunFilter(id=FlowRunFilterId(any_=[run]))}


def _states(client: SyncPrefectClient, run: UUID) -> list[str]:
    return [state.name for state in sorted(client.read_flow_run_states(run), key=lambda state: state.timestamp)]


def _wait(client: SyncPrefectClient, run: UUID, found_in: Callable[[str], Any]) -> Any:
    """Return what is found once a run's state has it."""
    deadline = time.monotonic() + 60 * MINUTES
    while not (found := found_in(state := _states(client, run)[-1])):
        assert state != "Failed" and time.monotonic() < deadline, _states(client, run)
        time.sleep(1)
    return found


if __name__ == "__main__":
    step = {one.__name__: one for one in (submit, trains, crashed, resumed, cached, metrics)}[sys.argv[1]]
    with get_client(sync_client=True) as client:
        print(step(client, *map(UUID, sys.argv[2:])))
