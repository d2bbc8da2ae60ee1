"""What an operator gets from running servers: metrics of the queue, and messages about what went wrong."""

import uuid
from datetime import UTC, datetime

import pytest
from prometheus_client.parser import text_string_to_metric_families

from live import Up, cm, give_gpus, make_live_workspace, worker
from processes import wait_until
from servers import client, webhook

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_live_workspace(tmp_path_factory.mktemp("observed") / "workspace")


@pytest.fixture(scope="module")
def gpu(root):
    """The variables of a worker with a GPU, or a stand-in for one."""
    return give_gpus(root, 1)


@pytest.fixture(scope="module")
def up(root, gpu):
    up = Up(root, "--no-workers")
    yield up
    assert up.stop() == 0


def metrics(up) -> dict:
    """Return what the endpoint of `cm up` says, {(name, label values): value}, read as Prometheus does."""
    answer = client().get(up.note["metrics"], auth=tuple(up.login.split(":")))
    families = text_string_to_metric_families(answer.text)
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_the_endpoint_of_cm_up_knows_the_queue(up):
    """A run that waits for a worker."""
    run_id = up.submit()
    wait_until(lambda: metrics(up)["cm_oldest_wait_seconds",] > 0)
    now = metrics(up)
    assert client().get(up.note["metrics"]).status_code == 401
    assert (now["cm_runs_waiting",], now["cm_runs_running",], now["cm_gpu_slots", "all"]) == (1, 0, 1)
    assert [now["cm_source_up", name] for name in ("machine", "prefect", "mlflow", "states")] == [1] * 4
    assert "metrics  http://127.0.0.1:" in up.welcome
    up.api.delete(f"/flow_runs/{run_id}").raise_for_status()


def test_alerts_reach_their_address_and_stay_as_the_user_left_them(up):
    with webhook() as (address, told):
        made = cm(up.root, "alerts", address)
        assert made.returncode == 0, made.stderr
        assert made.stdout.count(": created") == 5 and "Alert: finished" not in made.stdout

        run_id = up.submit()
        failed = {"type": "FAILED", "name": "Failed", "message": "out of memory"}
        up.post(f"/flow_runs/{run_id}/set_state", state=failed, force=True)
        disk = {"prefect.resource.id": "cm.disk.here.cache", "prefect.resource.name": "here: 1.0 GiB are free"}
        event = {"id": str(uuid.uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": "cm.disk.low"}
        up.api.post("/events", json=[{**event, "resource": disk}]).raise_for_status()
        name = up.flow_run(run_id)["name"]

        def arrived():
            messages = {one["title"]: one["message"] for one in told}  # of runs that are late by now as well
            return {"a disk gets full", f"{name} failed"} <= messages.keys() and messages

        messages = wait_until(arrived)
        assert messages["a disk gets full"] == "here: 1.0 GiB are free"
        assert messages[f"{name} failed"] == f"out of memory\n{up.note['prefect']}/runs/flow-run/{run_id}"

    known = {one["name"]: one for one in up.post("/automations/filter")}
    edited = known["Alert: failed"]
    up.api.patch(f"/automations/{edited['id']}", json={"enabled": False}).raise_for_status()
    again = cm(up.root, "alerts", "json://127.0.0.1:1/", "--on", "failed", "finished")
    assert "Alert: failed: there already, left as it is" in again.stdout and "Alert: finished: created" in again.stdout
    assert not {one["name"]: one for one in up.post("/automations/filter")}["Alert: failed"]["enabled"]


def test_a_run_that_waits_and_one_that_is_lost_are_told_and_measured(up, gpu):
    """No worker, then one, which dies with all it has started; nobody tells the server but the missing heartbeats."""
    with webhook() as (address, told):
        assert cm(up.root, "alerts", address).returncode == 0
        run_id = up.submit()

        def named():
            return up.flow_run(run_id)["name"]  # another once it runs

        def message(subject):
            return {one["title"]: one["message"] for one in told}.get(f"{named()} {subject}")

        def age():
            return metrics(up).get(("cm_lease_age_seconds", "run", named()))

        wait_until(lambda: message("waits for a worker"))
        before = metrics(up)  # the runs of the tests above ended without a worker; so did their waits
        with worker(up, "lost", **gpu):
            up.wait_in(run_id, lambda: age() is not None)
            waits = up.wait_in(run_id, lambda: (now := metrics(up)).get(("cm_queue_wait_seconds_count", "gpu")) and now)
        count, seconds = (
            waits[key, "worker"] - before.get((key, "worker"), 0)
            for key in ("cm_queue_wait_seconds_count", "cm_queue_wait_seconds_sum")
        )
        assert count == 1 and seconds > 10, "counted when it ends, not when it is first seen"
        assert waits["cm_queue_wait_seconds_sum", "gpu"] >= 0
        ages = []
        wait_until(lambda: message("crashed, or shows no sign of life") or ages.append(age()), every=1)
        assert message("crashed, or shows no sign of life").startswith("No sign of life for 90 s")
        assert max(filter(None, ages)) > 60, "three heartbeats are missing"
        wait_until(lambda: up.states(run_id)[-1] == "AwaitingRetry")
    up.api.delete(f"/flow_runs/{run_id}").raise_for_status()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing://secret",), "no address that apprise knows"),
        (("json://here", "--on", "x"), "--on x: there are failed"),
    ],
)
def test_alerts_that_cannot_be_are_refused(up, arguments, words):
    refused = cm(up.root, "alerts", *arguments)
    assert refused.returncode == 2 and words in refused.stderr and "secret" not in refused.stderr
