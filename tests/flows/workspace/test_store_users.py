"""`cm gc` takes nothing from a cache that another MLflow or another workspace may still need."""

import json
import socket
from datetime import timedelta
from pathlib import Path

import pytest

from command import run as cm
from flows.errors import UserError
from flows.operations import services
from flows.operations.garbage import find_garbage, object_key
from flows.operations.service_environment import Services, client_variables
from flows.storage.folder import Folder
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.tracker import Tracker
from flows.workspace import clone
from flows.workspace.dvc_files import locked_outs, version
from flows.workspace.store_users import USERS, own_records, records
from miniature import git, make_workspace, two_machines
from servers import mlflow_server

HERE = socket.gethostname()


@pytest.fixture(autouse=True)
def own_shell(monkeypatch):
    for name in ("CM_HOME", "CM_RECORDS", "CM_STATE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, f"{HERE}:/work/mlflow.db"),
        ({"MLFLOW_TRACKING_URI": "https://me:secret@mlflow.example/team?token=secret"}, "https://mlflow.example/team"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}, f"{HERE}:http://127.0.0.1:5000"),
        ({"MLFLOW_TRACKING_URI": "http://localhost:5000"}, f"{HERE}:http://localhost:5000"),
        ({"MLFLOW_TRACKING_URI": "sqlite:////work/mlflow.db"}, f"{HERE}:/work/mlflow.db"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000", "CM_RECORDS": "/work/mlflow.db"}, f"{HERE}:/work/mlflow.db"),
        (
            {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000", "CM_RECORDS": "postgresql://db.example/cm"},
            "postgresql://db.example/cm",
        ),
    ],
)
def test_records_are_named_alike_by_all_who_can_read_them_and_by_nobody_else(monkeypatch, variables, name):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert records(Path("/work")) == name


def test_a_run_by_cm_up_has_the_workspaces_own_records_whatever_its_port(monkeypatch, tmp_path):
    at = Services("http://127.0.0.1:4200", "http://127.0.0.1:40404")
    for key, value in client_variables(tmp_path, at).items():
        monkeypatch.setenv(key, value)
    assert records(tmp_path) == own_records(tmp_path)


def users(cache):
    return {json.loads(cache.contents(entry.key))["mlflow"] for entry in cache.entries(USERS)}


def collected(root):
    return {one.what for one in find_garbage(root, older_than=timedelta(0), with_remote=False) if one.kind == "cache"}


@pytest.mark.slow
def test_a_cache_loses_nothing_that_another_mlflow_needs(tmp_path, monkeypatch):
    root = make_workspace(tmp_path / "workspace")
    cache = Folder(root / ".dvc" / "cache")
    with clone.clone(root, "own records") as run:
        run.reproduce("prepare")
    assert not users(cache) and collected(root), "they are always read"
    with mlflow_server(tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        tracker = Tracker(root)
        with clone.clone(root, "elsewhere") as run, PipelineRun(tracker, "run", {"recipe": "mine"}, {}) as parent:
            run.reproduce("prepare")
            outs = locked_outs(run.reproduce("teacher").entry)
            tracker.set_tags(parent.run_id, {"dvc.out": version(outs)})
        needed = {object_key(md5) for md5 in outs.values()}
        assert users(cache) == {f"{HERE}:{address}"} and not needed & collected(root)
        git(root, "remote", "add", "origin", "https://git.example/moved")
        assert not needed & collected(root), "whatever its repository is called"
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        with pytest.raises(UserError, match="whose references cannot be seen from here.*nothing is removed") as refused:
            collected(root)
        assert str(refused.value).startswith(f"{cache.root} is used by others") and address in str(refused.value)
        cache.remove([entry.key for entry in cache.entries(USERS)])
        assert needed <= collected(root), "what would have been lost"


@pytest.mark.slow
def test_a_shared_cache_loses_nothing_that_another_workspace_needs(tmp_path, monkeypatch, capsys):
    first, second = two_machines(make_workspace(tmp_path / "first"))
    cache = Folder(tmp_path / "cache")
    for root in (first, second):
        (root / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {cache.root}\n")
        with clone.clone(root, "run") as run:
            run.reproduce("prepare")
    objects = {entry.key for entry in cache.entries("files/")}
    monkeypatch.chdir(first)
    code, _, said = cm(capsys, "gc", "--older-than", "0", "--apply")
    assert code == 2 and f"{second}/mlflow.db with {first}" in said and "nothing is removed" in said
    assert objects and {entry.key for entry in cache.entries("files/")} == objects


@pytest.mark.slow
def test_commands_read_the_records_of_cm_up_where_it_keeps_them(tmp_path, monkeypatch, capsys):
    root = make_workspace(tmp_path / "workspace")
    monkeypatch.chdir(root)
    with mlflow_server(tmp_path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with PipelineRun(Tracker(root), "of the team", {"recipe": "mine"}, {}):
            pass
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert cm(capsys, "runs")[1].startswith("No runs yet"), "nothing says where they are"
        with services._hold(root):
            at = Services("http://127.0.0.1:1", address, records="postgresql://db.example/cm")
            services._write_note(root, at, [])
            assert services.running(root) == at
            (found,) = json.loads(cm(capsys, "runs", "--json")[1])
            assert found["title"] == "of the team" and records(root) == "postgresql://db.example/cm"


def test_the_records_of_cm_up_are_not_taken_for_those_of_a_server_that_the_shell_names(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    services._set_default(client_variables(tmp_path, Services("http://127.0.0.1:1", "http://127.0.0.1:2")))
    assert records(tmp_path) == "https://mlflow.example"
