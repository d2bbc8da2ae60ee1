"""The data report of a real run: the task's artifact in Prefect, the page in MLflow."""

import pytest

from flows.tracking.tracker import Tracker
from live import cm, make_live_workspace


@pytest.mark.soak
def test_the_data_report_is_a_task_artifact_and_a_page_in_mlflow(tmp_path, monkeypatch):
    from prefect.client.orchestration import get_client

    from flows.orchestration.embedded import embedded_prefect

    root = make_live_workspace(tmp_path / "ws")
    done = cm(root, "run", "tiny", "--set", "student.train.num_steps=200")
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("CM_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    with embedded_prefect(root), get_client(sync_client=True) as client:
        found = {artifact.key: artifact for artifact in client.read_latest_artifacts(limit=100)}
        (task,) = [run for run in client.read_task_runs(limit=50) if run.name == "prepare"]
    assert found["data-report"].task_run_id == task.id
    assert "64 training images" in found["data-report"].data and "| exact | 0 | 0 | 0 |" in found["data-report"].data
    tracker = Tracker(root)
    runs = tracker.client.search_runs([tracker.experiment_id])
    paths = {file.path for run in runs for file in tracker.client.list_artifacts(run.info.run_id, "prepare")}
    assert {"prepare/report.html", "prepare/report.json", "prepare/extremes.png"} <= paths
