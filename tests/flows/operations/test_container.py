"""A container's SIGTERM and the training in it: compose.yaml starts its worker by the same entry."""

import json
import sys
from contextlib import contextmanager

import pytest
import yaml

from flows.operations.process_trees import still_runs
from flows.operations.service_environment import Services, client_variables
from live import Up, end_tree, make_live_workspace, running, trainings, worker
from miniature import REPOSITORY
from processes import WAIT, wait_until

ENTRY = "flows.operations.worker"


def test_the_worker_of_compose_is_started_by_the_entry_and_has_the_time_it_needs():
    service = yaml.safe_load((REPOSITORY / "infra" / "compose.yaml").read_text())["services"]["worker"]
    assert service["command"][:6] == ["python", "-m", ENTRY, "prefect", "worker", "start"]
    assert service["stop_grace_period"] == "2m" and 3 * int(service["environment"]["CM_GRACE"]) < 120


@contextmanager
def container(up, run_id, kind):
    """Run the first process of a container: a worker, or, as in Docker's and Kubernetes' pools, that of one run."""
    if kind == "worker":
        with worker(up, "a", entry=(ENTRY,)) as first:
            yield first
        return
    template = json.loads((REPOSITORY / "infra" / "work-pools" / f"{kind}.json").read_text())
    python, *command = template["variables"]["properties"]["command"]["default"].split()
    theirs = client_variables(up.root, Services(up.note["prefect"], up.note["mlflow"]))
    theirs["PREFECT__FLOW_RUN_ID"] = run_id
    with running(up.root, "run", [sys.executable, *command], up.root, theirs) as first:
        yield first


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["worker", "kubernetes"])
def test_a_training_is_saved_when_its_container_is_stopped(tmp_path, kind):
    """No state is saved before: the one that is there afterwards is that of SIGTERM."""
    root = make_live_workspace(tmp_path / "workspace")
    up = Up(root, "--no-workers")
    try:
        train = "{num_steps: 100000, batch_size: 8, log_every: 10, save_every: 100000, grid_every: 100000}"
        run_id = up.submit("teacher=null", "student.method=ect", "student.init_from=random", f"student.train={train}")
        with container(up, run_id, kind) as first:
            (training,) = wait_until(lambda: trainings(root))
            wait_until(lambda: up.artifacts(run_id).get("progress-student", {}).get("data", 0) > 0)
            assert not list(root.glob(".cm/states/student-*/step-*"))
            inside = first.children(recursive=True)
            first.terminate()
            first.wait(WAIT)
            for one in inside:  # with a container's first process the others end, at once
                end_tree(one)
        assert list(root.glob(".cm/states/student-*/step-*"))
        wait_until(lambda: not still_runs(training))
        wait_until(lambda: "Crashed" in up.states(run_id))
    finally:
        up.stop()
