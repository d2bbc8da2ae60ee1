"""Whole flows, twice at once, and while the servers and the database behind them die and come back."""

import signal
import time
from itertools import chain

import pytest

from flows.operations.process_trees import still_runs
from live import Servers, cm, give_gpus, make_live_workspace, trainings, worker
from processes import wait_until
from servers import needs_postgres, postgres

pytestmark = [pytest.mark.soak, needs_postgres]
LONG = 1000  # steps: about a minute
AWAY, LONG_AWAY = 15, 90  # seconds


@pytest.fixture(scope="module")
def database():
    with postgres() as database:
        yield database


@pytest.fixture(scope="module")
def servers(database, tmp_path_factory):
    """Both servers on PostgreSQL, two workers with two GPUs, one slot for heavy stages."""
    root = make_live_workspace(tmp_path_factory.mktemp("flows") / "workspace")
    gpus = give_gpus(root, 2)
    (root / ".cm").mkdir()
    servers = Servers(root, f"postgresql://postgres:postgres@{database.place}/postgres")
    try:
        servers.start("prefect", "mlflow")
        deployed = cm(root, "deploy", "--gpus", "1", **servers.client_variables)
        assert deployed.returncode == 0, deployed.stderr
        with worker(servers, "a", **gpus), worker(servers, "b", **gpus):
            yield servers
    finally:
        servers.end_all()


def in_mid_training(servers, run_id):
    """Wait until a run's student trains and has saved a state."""
    servers.wait_in(run_id, lambda: servers.artifacts(run_id).get("progress-student", {}).get("data", 0) > 10)


def every(count, by=10):
    return list(range(by, count + 1, by))


def test_of_two_identical_flows_one_trains_and_the_other_waits(servers):
    pair = [servers.submit(), servers.submit()]
    for run_id in pair:
        servers.wait_for(run_id, "Completed")
    assert servers.trained_steps(*pair) == [every(600)]
    assert [len(servers.stage_runs(stage, *pair)) for stage in ("features", "teacher", "evaluate")] == [1, 1, 1]
    ends = set.union(*map(servers.task_ends, pair))
    assert {"Cached", "Completed"} == {state for name, state in ends if name == "student"}
    assert any("waits for a slot of the limit `gpu`" in line for line in chain(*map(servers.said, pair)))


def test_where_gpus_suffice_for_both_the_other_waits_all_the_same(servers):
    """The first training stands still until the other waits: how soon a worker takes the second run is chance."""
    waits = "student: another run makes exactly this; waiting for it"
    servers.api.patch("/v2/concurrency_limits/gpu", json={"limit": 2}).raise_for_status()
    first = servers.submit("student.train.num_steps=610")
    in_mid_training(servers, first)
    (training,) = trainings(servers.root)
    training.suspend()
    second = servers.submit("student.train.num_steps=610")
    servers.wait_in(second, lambda: waits in servers.said(second))
    training.resume()
    for run_id in (first, second):
        servers.wait_for(run_id, "Completed")
    servers.api.patch("/v2/concurrency_limits/gpu", json={"limit": 1}).raise_for_status()
    assert waits not in servers.said(first)
    assert servers.trained_steps(first) == [every(610)]
    assert ("student", "Cached") in servers.task_ends(second)


@pytest.mark.parametrize("number", (signal.SIGKILL, signal.SIGTERM))
def test_a_prefect_server_that_comes_back_ends_no_run(servers, number):
    run_id = servers.submit(f"student.train.num_steps={LONG + 10 * number}")
    in_mid_training(servers, run_id)
    servers.end("prefect", number)
    time.sleep(AWAY)
    servers.start("prefect")
    servers.wait_for(run_id, "Completed")
    assert servers.trained_steps(run_id) == [every(LONG + 10 * number)]
    assert servers.flow_run(run_id)["run_count"] == 1


def test_a_database_that_crashes_and_comes_back_ends_no_run(servers, database):
    """It is behind both servers; what the stage could not log meanwhile is in MLflow in the end."""
    run_id = servers.submit(f"student.train.num_steps={LONG}")
    in_mid_training(servers, run_id)
    database.crash()
    time.sleep(AWAY)
    database.start()
    servers.wait_for(run_id, "Completed")
    assert servers.trained_steps(run_id) == [every(LONG)]
    assert servers.flow_run(run_id)["run_count"] == 1


def test_a_run_waits_for_a_server_that_is_away_for_long(servers):
    """Longer than Prefect's client tries: the training ends, and the next stage waits for its slot."""
    run_id = servers.submit(f"student.train.num_steps={LONG + 20}")
    in_mid_training(servers, run_id)
    (training,) = trainings(servers.root)
    servers.end("prefect")
    wait_until(lambda: not still_runs(training), every=1)
    time.sleep(LONG_AWAY)
    servers.start("prefect")
    servers.wait_for(run_id, "Completed")
    assert servers.trained_steps(run_id) == [every(LONG + 20)]
