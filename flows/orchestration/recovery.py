"""Close what a killed earlier start of the flow run has left open."""

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.states import Crashed

from flows.errors import StageFailed
from flows.tracking.tracker import Tracker

MAX_STARTS = 10  # of one flow run, which restarts after every crash


def end_earlier_starts(tracker: Tracker) -> None:
    """Close task runs and MLflow runs of this flow run's earlier starts. Raises StageFailed after MAX_STARTS."""
    if runtime.flow_run.run_count > MAX_STARTS:
        raise StageFailed(f"this flow run has crashed {MAX_STARTS} times and is not started once more")
    if runtime.flow_run.run_count > 1:
        _end_task_runs()
        _end_tracked_runs(tracker)


def _end_task_runs() -> None:
    this = FlowRunFilter(id=FlowRunFilterId(any_=[runtime.flow_run.id]))
    with get_client(sync_client=True) as client:
        for task_run in client.read_task_runs(flow_run_filter=this):
            if task_run.state and not task_run.state.is_final():
                client.set_task_run_state(task_run.id, Crashed(message="Its process is gone."), force=True)


def _end_tracked_runs(tracker: Tracker) -> None:
    query = f"tags.`prefect.flow_run_id` = '{runtime.flow_run.id}' and attributes.status = 'RUNNING'"
    for lost in tracker.client.search_runs([tracker.experiment_id], query):
        tracker.client.set_terminated(lost.info.run_id, "KILLED")
