"""The flow: what it skips, what it retries, what it shows, and that both doors share one cache."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from rich.console import Console

from cm_core.methods.ct import CT
from flows.errors import RunEnding, StageFailed, UserError
from flows.operations.deploy import deployment_entries
from flows.recipes import naming
from flows.recipes.recipe import EDITED, Recipe, load_recipe, recipe_names, write_active
from flows.stages.student import Student
from flows.storage import allowed
from flows.tracking.person import USER
from flows.tracking.tracker import LINEAGE, Tracker
from flows.workspace.dvc_files import Cache, load_yaml, locked_outs, read_stages
from miniature import REPOSITORY, git, make_workspace, traced
from processes import runs, wait_until


def test_every_recipe_is_a_deployment_with_its_values_in_the_form():
    entries = deployment_entries(REPOSITORY)
    assert [entry["name"] for entry in entries] == recipe_names(REPOSITORY)
    for entry in entries:
        assert Recipe.model_validate(entry["parameters"]["recipe"]) == load_recipe(entry["name"], root=REPOSITORY)
        assert entry["description"].endswith(".") and "\n" not in entry["description"]
    tags = {entry["name"]: entry["tags"] for entry in entries}
    assert tags["digits-ct"] == ["digits", "ct", "cpu"] and tags["lsun256-cd"][1:] == ["cd", "gpu"]


@pytest.fixture(scope="module")
def pipeline():
    from flows import pipeline

    return pipeline


def test_a_recipe_from_a_server_is_validated_without_reading_its_machine(pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(allowed, "_restricted_to", None)
    (tmp_path / "config.json").write_text('{"latent_channels": "secret"}')
    recipe = load_yaml(REPOSITORY / "params/recipes/folder-256-latents.yaml")
    recipe["data"]["latents"]["autoencoder"] = str(tmp_path)
    with pytest.raises(UserError, match=f"data.latents.autoencoder: {tmp_path}: holds no "):
        pipeline._valid(recipe, "x", REPOSITORY)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "one")
    with pytest.raises(UserError, match=f"^{tmp_path}: a recipe from a server may not read it"):
        pipeline._valid(recipe, "x", REPOSITORY)


def test_runs_have_readable_names():
    assert naming.title(Recipe(), "digits-cd") == "digits-cd · cd heun N=18"
    assert naming.title(Recipe(student=Student(method=CT())), "") == "ct s0=2 s1=150"


def test_a_run_that_the_form_changed_is_called_by_what_differs():
    def called(name, *overrides, **options):
        return naming.called(load_recipe(name, overrides, root=REPOSITORY, **options), name, REPOSITORY)

    assert called("digits-cd") == "digits-cd"
    assert called("folder-64", base=REPOSITORY) == "folder-64", "absolute paths are no change"
    assert called("digits-cd", "seed=3", "student.method=ct") == "digits-cd seed=3 student.method.kind=ct"
    assert called("digits-cd", "student.method=ect", "student.method.q=3") == (
        "digits-cd student.method.kind=ect student.method.q=3.0"
    ), "its default distance is another than the file's, but not chosen"
    assert called("digits-cd", "student.method.distance=l1") == "digits-cd student.method.distance.kind=l1"
    assert naming.called(load_recipe("digits-cd", ["seed=3"], root=REPOSITORY), "my own", REPOSITORY) == "my own"


def test_stages_side_by_side_share_the_cores(pipeline, monkeypatch):
    stages = read_stages(REPOSITORY)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    threads = {name: pipeline.threads_for(stage, stages) for name, stage in stages.items()}
    alone, halved = ("prepare", "base", "student", "evaluate"), ("features", "teacher", "sample", "edit")
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


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (RunEnding("teacher"), "CANCELLED", "stopped with its run"),
        (UserError("data.source.path: no such file"), "FAILED", "data.source.path: no such file"),
    ],
)
def test_a_stage_that_is_stopped_or_refused_says_so_in_its_state(pipeline, root, monkeypatch, error, state, message):
    def reproduce(stage, **_):
        raise error

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    ended = pipeline.reproduce.fn("teacher", {}, SimpleNamespace(root=root, reproduce=reproduce), {})
    assert (ended.type.name, ended.message) == (state, message)


def test_a_run_that_is_refused_says_so_in_its_state(pipeline, tmp_path):
    ended = pipeline.consistency.fn(Recipe(), EDITED, tmp_path)
    assert ended.type.name == "FAILED" and ended.message.startswith(f"{tmp_path}: not inside a workspace")


def test_sections_of_a_server_that_do_not_fit_together_are_refused_in_the_state(pipeline):
    recipe = Recipe().model_dump(mode="json") | {"teacher": None}
    ended = pipeline.consistency.fn(recipe, "mine")
    said = "mine: recipe: student.method.kind=cd distils a teacher, and teacher is null; train one or use ct"
    assert ended.type.name == "FAILED" and ended.message == said


def test_a_finished_run_says_its_numbers_in_its_state(pipeline):
    fids = {"real": 0.1, "nfe_2": 2.4564, "nfe_1": 12.6595, "nfe_1_ema1": 3, "teacher_nfe_35": 2}
    stages = {"prepare": {"cached": True}, "student": {"cached": False}}
    said = pipeline.in_a_line({"metrics": {"is_classifier": {}, "fid_classifier": fids}, "stages": stages})
    assert said == "FID 12.7 at 1 call, 2.46 at 2; 1 of 2 stages cached"


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
        ({"CM_CHAMPION_METRIC": "loss"}, "CM_CHAMPION_METRIC=loss: expected nfe_N/fid"),
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
        pipeline.carry_out(recipe, EDITED, root)
    assert not list(root.glob(".cm/runs/*"))


@pytest.mark.parametrize("left", [None, {"__exc_type__": "flows.errors.UserError", "message": "no such file"}])
def test_what_a_cancelled_or_failed_task_left_is_not_taken_for_its_stages_result(pipeline, root, tmp_path, left):
    from prefect.filesystems import LocalFileSystem
    from prefect.results import ResultStore
    from prefect.serializers import JSONSerializer

    store = ResultStore(result_storage=LocalFileSystem(basepath=str(tmp_path)), serializer=JSONSerializer())
    workspace = SimpleNamespace(root=root, set_damaged_aside=lambda outs: False)
    asked = SimpleNamespace(result_store=store), {"workspace": workspace, "stage": "prepare", "inputs": {}}
    key = pipeline.key_unless_gone(*asked)
    store.write(left, key=key)
    assert store.exists(key)
    assert pipeline.key_unless_gone(*asked) == key and not store.exists(key)


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
    monkeypatch.setenv("CM_USER", "ada")
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
    assert parent.data.metrics == {"nfe_1/fid": 2.5, "curves/fid_against_nfe": 2.5}
    assert parent.data.tags["features"] == "classifier" and parent.data.tags["result"] == "FID 2.5 at 1 call"
    assert parent.data.params["student.method.num_scales"] == "18"
    made = locked_outs(results["stages"]["teacher"]["entry"])["out/teacher"]
    lineage = json.loads(Path(client.download_artifacts(parent.info.run_id, LINEAGE)).read_text())
    assert lineage["outputs"]["teacher"] == {"out/teacher": made} and made in parent.data.tags["dvc.outs"].split()
    assert parent.data.tags["git.revision"] == git(root, "rev-parse", "HEAD").strip() == results["revision"]
    assert parent.data.tags[USER] == "ada" and parent.data.tags["user.known_by"] == "CM_USER"
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == [
        "edits.patch",
        "evaluate",
        "lineage.json",
    ]

    assert load_recipe(str(root / "params/active.yaml"), root=root) == Recipe(seed=1)
    assert dvc(root, "repro").count("didn't change, skipping") == 4
    assert dvc(root, "status") == "Data and pipelines are up to date.\n"

    again = run(1, keep=False)
    assert cached(again) == ALL
    assert {result["seconds"] for result in again["stages"].values()} == {0.0}, "DVC was not even asked"
    numbers = client.get_run(again["mlflow"]["run_id"]).data.metrics
    assert numbers == parent.data.metrics, "the numbers are there also when nothing ran"


@soak
def test_prefect_has_the_metrics_the_progress_and_the_way_to_mlflow(run, root):
    from prefect.client.orchestration import get_client

    from flows.orchestration.embedded import embedded_prefect

    results = run(2, keep=False)
    with embedded_prefect(root), get_client(sync_client=True) as client:
        found = {artifact.key: artifact for artifact in client.read_latest_artifacts(limit=100)}
        names = {task_run.name for task_run in client.read_task_runs(limit=50)}
        tags = client.read_flow_runs(limit=1)[0].tags
    assert found["progress-teacher"].data == 25.0
    assert [tag.startswith("user:") for tag in tags] == [True], "Prefect's pages filter by it"
    result = found["result"].data
    assert "| 1 call | 2.500 |" in result and results["mlflow"]["run_id"] in result
    assert "![plot](data:image/png;base64," in result and "![lineage](data:image/svg+xml;base64," in result
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
    for _ in range(2):  # nor is the refusal kept as the stage's result
        with pytest.raises(UserError, match="seed=1: must be larger"):
            run(8, keep=False)
    assert [name for name, *_ in traced(trace)] == ["prepare", "prepare"]


@soak
def test_an_interrupted_run_leaves_nothing_running(run, root, monkeypatch, tmp_path):
    trace = tmp_path / "trace"
    monkeypatch.setenv("MINI_TRACE", str(trace))
    monkeypatch.setenv("MINI_SECONDS", "600")

    def interrupt():
        wait_until(lambda: traced(trace))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(9, keep=False)
    assert not runs(int(traced(trace)[0][2]))
    (newest,) = Tracker(root).client.search_runs(["1"], "tags.stage = 'pipeline'", max_results=1)
    assert newest.info.status == "KILLED"
