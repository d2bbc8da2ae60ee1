"""What an operator gets from running servers: metrics of the queue, and messages about what went wrong."""

import uuid
from datetime import UTC, datetime

import pytest
from prometheus_client.parser import text_string_to_metric_families

from live import Up, cm, make_live_workspace
from processes import wait_until
from servers import client, webhook

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    up = Up(make_live_workspace(tmp_path_factory.mktemp("observed") / "workspace"), "--no-workers")
    yield up
    assert up.stop() == 0


def test_the_endpoint_of_cm_up_knows_the_queue(up):
    """A run that waits for a worker, read as Prometheus does."""
    run_id = up.submit()

    def found() -> dict:
        answer = client().get(up.note["metrics"], auth=tuple(up.login.split(":")))
        families = text_string_to_metric_families(answer.text)
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}

    wait_until(lambda: found()["cm_oldest_wait_seconds",] > 0)
    now = found()
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
