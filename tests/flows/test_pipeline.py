"""The flow: what it skips, what it retries, what it shows, and that both doors share one cache."""

import io
import logging
import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from rich.console import Console

from cm_core.methods.ct import CT
from flows.errors import StageFailed, UserError
from flows.operations.deploy import deployment_entries, form_of
from flows.recipes.recipe import Recipe, load_recipe, recipe_names, write_active
from flows.stages.student import Student
from flows.tracking.tracker import Tracker
from flows.workspace.dvc_files import Cache, load_yaml, locked_outs, read_stages
from miniature import REPOSITORY, git, make_workspace
from processes import runs, wait_for


def test_every_recipe_is_a_deployment_with_its_values_in_the_form():
    entries = deployment_entries(REPOSITORY)
    assert [entry["name"] for entry in entries] == recipe_names(REPOSITORY)
    for entry in entries:
        assert Recipe.model_validate(entry["parameters"]["recipe"]) == load_recipe(entry["name"], root=REPOSITORY)
        assert entry["description"] and not entry["description"].startswith("#")


def test_the_form_asks_for_the_recipe_and_a_name_alone(pipeline):
    schema = form_of(pipeline.consistency)
    assert set(schema["properties"]) == {"recipe", "name"}
    assert not set(schema["required"]) & {"name", "root"}


@pytest.fixture(scope="module")
def pipeline():
    from flows import pipeline

    return pipeline


def test_runs_have_readable_names(pipeline):
    assert pipeline.title(Recipe(), "digits-cd") == "digits-cd · cd heun N=18"
    assert pipeline.title(Recipe(student=Student(method=CT())), "") == "ct s0=2 s1=150"


def test_stages_side_by_side_share_the_cores(pipeline, monkeypatch):
    stages = read_stages(REPOSITORY)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    threads = {name: pipeline.threads_for(stage, stages) for name, stage in stages.items()}
    alone, halved = ("prepare", "student", "evaluate"), ("features", "teacher", "sample", "edit")
    assert threads == {**dict.fromkeys(alone, 8), **dict.fromkeys(halved, 4)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert pipeline.threads_for(stages["teacher"], stages) == 3


def test_progress_that_cannot_be_shown_ends_nothing(pipeline, monkeypatch, caplog):
    from flows.orchestration import artifacts

    def unreachable(*_, **__):
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(artifacts, "create_progress_artifact", unreachable)
    artifacts.ProgressArtifact("teacher").show({"done": 1, "total": 2, "unit": "steps"})
    assert caplog.messages == ["teacher: progress is not shown, the stage continues: refused"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def run(pipeline, root, monkeypatch):
    """Run the flow in the miniature workspace: the recipe's seed decides prepare and teacher, the rest follows."""
    for name in ("CM_HOME", "MLFLOW_TRACKING_URI", "MINI_SECONDS"):
        monkeypatch.delenv(name, raising=False)

    def run(seed, **options):
        return pipeline.run(Recipe(seed=seed), root, **options)

    return run


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CM_CHAMPION_METRIC": "loss"}, "CM_CHAMPION_METRIC=loss: expected fid"),
        ({"CM_DEVICES": "3"}, "CM_DEVICES=3: must divide student.train.batch_size=128"),
        ({"CM_DEVICES": "2", "CM_SHARD": "yes"}, "CM_SHARD=yes: must be 1"),
        ({"CM_DEVICES": "2", "CM_SHARD": "1"}, "CM_SHARD=1: student.method.kind=scm takes forward-mode derivatives"),
    ],
)
def test_what_the_environment_asks_in_vain_is_refused_before_a_clone_is_made(
    pipeline, root, monkeypatch, variables, said
):
    monkeypatch.chdir(root)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(
        "cifar10-sct", ["teacher.train.batch_size=96", "student.train.batch_size=128"], root=REPOSITORY
    )
    with pytest.raises(UserError, match=said):
        pipeline.consistency.fn(recipe)
    assert not list(root.glob(".cm/runs/*"))


def cached(results):
    return {stage: result["cached"] for stage, result in results["stages"].items()}


def dvc(root, *arguments):
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


ALL, NONE = (dict.fromkeys(["prepare", "features", "teacher", "evaluate"], value) for value in (True, False))
soak = pytest.mark.soak


@soak
def test_a_run_computes_tracks_shows_and_hands_over(run, root, monkeypatch):
    (root / "remark.txt").write_text("an uncommitted edit")
    from prefect.logging.handlers import PrefectConsoleHandler

    said = io.StringIO()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            monkeypatch.setattr(handler, "console", Console(file=said))
    results = run(1, name="mini")
    assert cached(results) == NONE and results["title"] == "mini · cd heun N=18"
    assert "hello from teacher\n" in said.getvalue() and "\nteacher: done in" in said.getvalue()
    assert "Beginning flow run" not in said.getvalue() and "Finished in state" not in said.getvalue()

    client = Tracker(root).client
    parent = client.get_run(results["mlflow"]["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"fid_classifier/real": 0.5, "fid_classifier/nfe_1": 2.5}
    assert parent.data.params["student.method.num_scales"] == "18"
    assert parent.data.tags["dvc.out.teacher"] == locked_outs(results["stages"]["teacher"]["entry"])["out/teacher"]
    assert parent.data.tags["git.revision"] == git(root, "rev-parse", "HEAD").strip() == results["revision"]
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["edits.patch", "evaluate"]

    assert load_recipe(str(root / "params/active.yaml"), root=root) == Recipe(seed=1)
    assert dvc(root, "repro").count("didn't change, skipping") == 4
    assert dvc(root, "status") == "Data and pipelines are up to date.\n"

    again = run(1, keep=False)
    assert cached(again) == ALL
    assert {result["seconds"] for result in again["stages"].values()} == {0.0}, "DVC was not even asked"
    numbers = client.get_run(again["mlflow"]["run_id"]).data.metrics
    assert numbers == parent.data.metrics, "the numbers are there also when nothing ran"


@soak
def test_prefect_has_the_metrics_the_progress_and_the_way_to_mlflow(run):
    from prefect.client.orchestration import get_client

    results = run(2, keep=False)
    with get_client(sync_client=True) as client:
        found = {artifact.key: artifact for artifact in client.read_latest_artifacts(limit=100)}
        names = {task_run.name for task_run in client.read_task_runs(limit=50)}
    assert found["progress-teacher"].data == 25.0
    assert '"nfe_1"' in found["metrics"].data and results["mlflow"]["run_id"] in found["mlflow"].data
    assert found["evaluate-below-plot"].data.startswith("data:image/png;base64,")
    assert set(ALL) <= names


@soak
def test_what_dvc_computed_the_flow_finds(run, root):
    write_active(Recipe(seed=3), root)
    dvc(root, "repro")
    results = run(3, keep=False)
    assert cached(results) == ALL
    assert results["stages"]["teacher"]["entry"] == load_yaml(root / "dvc.lock")["stages"]["teacher"]


@soak
def test_a_skipped_stage_whose_result_is_gone_runs_again(run, root):
    first = run(4, keep=False)
    outs = locked_outs(first["stages"]["teacher"]["entry"])
    Cache(root / ".dvc" / "cache").files(outs["out/teacher"])["result.txt"].unlink()
    again = run(4, keep=False)
    assert cached(again) == {**ALL, "teacher": False}, "evaluate reads the same bytes as before"
    assert again["stages"]["teacher"]["entry"]["outs"] == first["stages"]["teacher"]["entry"]["outs"]


@soak
def test_stages_after_skipped_ones_find_their_inputs(run, root):
    """Prepare and teacher are skipped without a shell; evaluate, its code changed, still reads what they made."""
    run(5, keep=False)
    text = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(text.replace("python stage.py evaluate", "python  stage.py evaluate"))
    assert cached(run(5, keep=False)) == {**ALL, "evaluate": False}
    (root / "dvc.yaml").write_text(text)


@soak
def test_a_crash_is_retried_and_bad_input_is_not(run, pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "reproduce", pipeline.reproduce.with_options(retry_delay_seconds=0))
    trace = tmp_path / "trace"
    monkeypatch.setenv("MINI_TRACE", str(trace))
    monkeypatch.setenv("MINI_CRASHES_ONCE", str(tmp_path / "teacher"))
    assert cached(run(6, keep=False)) == NONE and (tmp_path / "teacher").exists()
    monkeypatch.setenv("MINI_CRASHES", "features")
    with pytest.raises(StageFailed, match="ZeroDivisionError"):
        run(7, keep=False)
    trace.unlink()
    monkeypatch.setenv("MINI_REFUSES", "prepare")
    with pytest.raises(UserError, match="seed=1: must be larger"):
        run(8, keep=False)
    assert trace.read_text().splitlines()[0].startswith("prepare") and len(trace.read_text().splitlines()) == 1


@soak
def test_an_interrupted_run_leaves_nothing_running(run, root, monkeypatch, tmp_path):
    trace = tmp_path / "trace"
    monkeypatch.setenv("MINI_TRACE", str(trace))
    monkeypatch.setenv("MINI_SECONDS", "60")

    def interrupt():
        wait_for(trace.exists, seconds=120)  # Prefect starts first
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(9, keep=False)
    assert not runs(int(trace.read_text().split()[2]))
    (newest,) = Tracker(root).client.search_runs(["1"], "tags.stage = 'pipeline'", max_results=1)
    assert newest.info.status == "KILLED"
