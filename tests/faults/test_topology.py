"""The topology of infra/ as processes: PostgreSQL, an S3 store, both servers, and two workers that share nothing else.

Each worker has a folder and a home of its own and clones the code when a run begins. One of them is lost, with all it
had, in the middle of a training.
"""

import json

import pytest

from live import Servers, cm, end_tree, make_live_workspace, worker
from miniature import commit, git
from servers import aws_variables, needs_postgres, postgres, shared_s3

pytestmark = [pytest.mark.soak, needs_postgres]
REMOTE = (
    "[core]\n    remote = store\n    autostage = false\n['remote \"store\"']\n    url = s3://dvc\n    verify = true\n"
)


s3 = shared_s3("dvc", "mlflow", "states")


@pytest.fixture(scope="module")
def servers(s3, tmp_path_factory):
    """Both servers, and the recipes as deployments of the repository whose DVC remote is a bucket."""
    root = make_live_workspace(tmp_path_factory.mktemp("topology") / "repository")
    (root / ".dvc" / "config").write_text(REMOTE)
    git(root, "checkout", "--quiet", "-B", "main")
    commit(root)
    (root / ".cm").mkdir()
    with postgres() as database:
        url = f"postgresql://postgres:postgres@{database.place}/postgres"
        servers = Servers(root, url, artifacts="s3://mlflow", **aws_variables())
        try:
            servers.start("prefect", "mlflow")
            place = ("--repository", root.as_uri(), "--branch", "main")
            deployed = cm(root, "deploy", "--gpus", "2", *place, **servers.client_variables)
            assert deployed.returncode == 0, deployed.stderr
            yield servers
        finally:
            servers.end_all()


def machine(servers, folder, name):
    """A worker in an empty folder, with an empty home."""
    for part in ("home", "work"):
        (folder / name / part).mkdir(parents=True)
    variables = {**aws_variables(), "HOME": str(folder / name / "home"), "CM_STATE": "s3://states"}
    return worker(servers, name, folder / name / "work", **variables)


def keys(s3, bucket, part=""):
    found = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [entry["Key"] for page in found for entry in page.get("Contents", ()) if part in entry["Key"]]


@pytest.fixture(scope="module")
def moved(servers, s3, tmp_path_factory):
    """The id of a run that a second machine completed, after the first was lost in the middle of a training."""
    folder = tmp_path_factory.mktemp("machines")
    with machine(servers, folder, "first") as first:
        run_id = servers.submit()
        servers.wait_in(run_id, lambda: servers.artifacts(run_id).get("progress-student", {}).get("data", 0) > 30)
        servers.wait_in(run_id, lambda: keys(s3, "states", "student"))
        end_tree(first)
        (folder / "first").rename(folder / "lost")
        with machine(servers, folder, "second"):
            servers.wait_for(run_id, "Completed")
            yield run_id


def test_another_machine_goes_on_with_what_the_store_holds(servers, moved):
    assert servers.flow_run(moved)["run_count"] == 2
    states = servers.states(moved)
    assert states.index("Crashed") < states.index("AwaitingRetry") < states.index("Completed")
    (resumed,) = [line for line in servers.said(moved) if "resuming from step" in line]
    step = int(resumed.rpartition(" ")[2])
    before, after = servers.trained_steps(moved)
    assert after == list(range(step + 10, 601, 10)) and step >= 50 and step in before
    assert [len(servers.stage_runs(stage, moved)) for stage in ("prepare", "features", "teacher")] == [1, 1, 1]
    begun = {("prepare", "Completed"), ("teacher", "Completed"), ("student", "Crashed")}
    ended = {("prepare", "Cached"), ("teacher", "Cached"), ("student", "Completed"), ("evaluate", "Completed")}
    assert begun | ended <= servers.task_ends(moved)


def test_the_store_holds_results_states_and_what_mlflow_shows(servers, s3, moved):
    (evaluated,) = servers.stage_runs("evaluate", moved)
    assert keys(s3, "mlflow", evaluated["info"]["run_id"])
    assert keys(s3, "dvc", "files/md5") and keys(s3, "dvc", "runs/")
    heads = [s3.get_object(Bucket="states", Key=key)["Body"] for key in keys(s3, "states", "head.json")]
    trainings = [json.loads(head.read()) for head in heads]
    assert trainings and all(training["finished"] and not training["holder"] for training in trainings)


def test_the_same_run_again_is_all_cached_on_a_machine_that_did_half_of_it(servers, moved):
    again = servers.submit()
    servers.wait_for(again, "Completed")
    assert {state for _, state in servers.task_ends(again)} == {"Cached"}
    assert servers.trained_steps(again) == []
