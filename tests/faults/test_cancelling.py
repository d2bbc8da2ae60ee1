"""Cancelled or without its worker, a run leaves no process behind, whatever it was doing."""

import json
import signal
import time

import pytest

from fault_proxy import fault_proxy, slow
from flows.operations.process_trees import still_runs
from live import Up, end_tree, make_live_workspace, worker
from processes import command_line, wait_until
from servers import aws_variables, shared_s3

pytestmark = pytest.mark.soak
AWAY, SECONDS = "http://127.0.0.1:9", 60
client = shared_s3("team")


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    up = Up(make_live_workspace(tmp_path_factory.mktemp("cancelling") / "workspace"), "--no-workers")
    yield up
    up.stop()


@pytest.fixture
def silent():
    """A server that takes requests and answers none of them."""
    with fault_proxy(AWAY) as proxy:
        proxy.strike(slow(600))
        yield proxy


def downloading(up, silent, client):
    """Return overrides of a recipe, variables of a worker, and whether `prepare` is waiting for its images."""
    source = json.dumps({"kind": "images", "path": f"{silent.url}/images.zip"})
    return [f"data.source={source}"], {"CM_ALLOWED_SOURCES": silent.url}, lambda _: silent.seen


def measuring(up, silent, client):
    """The same, of `features`, in the middle of its training."""

    def trains(children):
        return any(command_line(child)[-2:] == ["stage", "features"] for child in children)

    return ["features.num_steps=1000000"], {}, trains


def pulling(up, silent, client):
    """The same, of `dvc repro --pull`, waiting for a remote that does not answer."""
    (up.root / ".dvc" / "config.local").write_text(
        "[core]\n    remote = team\n['remote \"team\"']\n    url = s3://team/dvc\n"
    )
    variables = {**aws_variables(), "AWS_ENDPOINT_URL": silent.url, "AWS_MAX_ATTEMPTS": "1"}
    return ["seed=5"], variables, lambda _: [path for _, path in silent.seen if ".cm" not in path]


def cancel(up, process, run_id):
    up.post(f"/flow_runs/{run_id}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})


def kill(up, process, run_id):
    process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("end", [cancel, kill])
@pytest.mark.parametrize("busy", [downloading, measuring, pulling])
def test_no_process_is_left_after_a_minute(up, silent, client, busy, end):
    overrides, variables, is_busy = busy(up, silent, client)
    try:
        with worker(up, f"{busy.__name__}-{end.__name__}", **variables) as process:
            run_id = up.submit(*overrides)
            wait_until(lambda: is_busy(process.children(recursive=True)))
            time.sleep(5)
            children = process.children(recursive=True)
            assert len(children) >= 2, "the flow's process and DVC's at least"
            end(up, process, run_id)
            deadline = time.monotonic() + SECONDS
            while any(map(still_runs, children)) and time.monotonic() < deadline:
                time.sleep(0.5)
            left = [command_line(child) for child in children if still_runs(child)]
            for child in children:
                end_tree(child)
            assert not left, (left, up.states(run_id), up.said(run_id)[-5:])
            up.api.delete(f"/flow_runs/{run_id}")  # or a crashed one would start again
    finally:
        (up.root / ".dvc" / "config.local").unlink(missing_ok=True)
