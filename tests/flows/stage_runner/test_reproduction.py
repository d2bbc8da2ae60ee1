"""`dvc repro` and `dvc exp run` with the real stages: each is a pipeline run, as a flow is."""

import json
import subprocess
import sys

import pytest

from flows.tracking.tracker import PARENT_TAG, Tracker
from live import environment, make_live_workspace

SMALL = "teacher=null", "student.method=ect", "student.init_from=random", "student.train.num_steps=10"
STAGES = ["base", "edit", "evaluate", "features", "prepare", "sample", "student", "teacher"]


@pytest.mark.slow
def test_reproductions_and_experiments_are_pipeline_runs(tmp_path, monkeypatch):
    """One in the workspace, one in a folder of DVC's own, and one of which nothing is left to run."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = make_live_workspace(tmp_path / "workspace")

    def run(*command, **variables):
        words, env = [sys.executable, "-m", *command], environment(root, **variables)
        ended = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    run("flows.cli", "use", "tiny", *(word for value in SMALL for word in ("--set", value)))
    run("dvc", "repro")
    run("dvc", "repro")
    longer = ("-S", "params/active.yaml:student.train.num_steps=12")
    run("dvc", "exp", "run", "--name", "longer", *longer)
    run(
        "dvc", "exp", "run", "--name", "again", "--temp", *(word.replace("12", "14") for word in longer), PYTHONPATH="."
    )

    shown = {one["title"]: one for one in json.loads(run("flows.cli", "runs", "--json"))}
    first, second, third = sorted(shown, key=len)
    assert first.startswith("tiny ") and "num_steps=10" in first and first.endswith(" · ect")
    assert second.startswith("again · tiny ") and third.startswith("longer · tiny ")
    tracker = Tracker(root)
    runs = {one.info.run_name: one for one in tracker.client.search_runs([tracker.experiment_id])}
    of_first = [
        one
        for one in tracker.client.search_runs([tracker.experiment_id])
        if one.data.tags.get(PARENT_TAG) == runs[first].info.run_id
    ]
    assert sorted(one.data.tags["stage"] for one in of_first) == STAGES
    assert runs[first].info.start_time == min(one.info.start_time for one in of_first)
    assert runs[third].data.tags["dvc.exp"] == "longer" and "nfe_1" in json.dumps(runs[third].data.metrics)
    assert all(one.data.tags.get(PARENT_TAG) for one in runs.values() if one.data.tags["stage"] in STAGES)
    versions = tracker.client.search_model_versions()
    assert sorted(one.tags["run_id"] for one in versions) == sorted(runs[one].info.run_id for one in shown)
