"""A flow run whose worker is killed: it ends, and its next start closes what it has left open."""

import os
import signal
import threading
import time

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.states import Crashed

from flows.errors import StageFailed
from flows.tracking.tracker import Tracker
from flows.workspace.process import flow_grace

LOOK_EVERY = 1.0  # seconds between looks at the worker
MAX_STARTS = 10  # of one flow run, which restarts after every crash


def end_with_worker() -> None:
    """End this process when its parent, the worker, is gone: nobody else could cancel the run.

    It gets SIGTERM, upon which the stages stop and the run is reported as crashed, then SIGKILL.
    """
    worker = os.getppid()

    def watch() -> None:
        while os.getppid() == worker:
            time.sleep(LOOK_EVERY)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(flow_grace())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_earlier_starts(tracker: Tracker) -> None:
    """Close task runs and MLflow runs of this flow run's earlier starts. Raises StageFailed after MAX_STARTS."""
    if runtime.flow_run.run_count > MAX_STARTS:
        raise StageFailed(f"this flow run has crashed {MAX_STARTS} times and is not started once more")
    if runtime.flow_run.run_count > 1:
        _end_task_runs()
        tracker.kill_runs("prefect.flow_run_id", runtime.flow_run.id)


def _end_task_runs() -> None:
    this = FlowRunFilter(id=FlowRunFilterId(any_=[runtime.flow_run.id]))
    with get_client(sync_client=True) as client:
        for task_run in client.read_task_runs(flow_run_filter=this):
            if task_run.state and not task_run.state.is_final():
                client.set_task_run_state(task_run.id, Crashed(message="Its process is gone."), force=True)
