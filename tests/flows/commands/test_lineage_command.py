"""`cm lineage`: the results of a workspace and of a run, and what of them is stale."""

import json

import pytest

from command import run
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.tracker import Tracker
from flows.workspace.dvc_files import dvc, locked_outs, read_lock, version
from miniature import make_workspace


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A workspace of four small stages, all of them up to date."""
    root = make_workspace(tmp_path_factory.mktemp("mini"))
    dvc(root, "repro")
    return root


def stale(capsys, *arguments):
    nodes = json.loads(run(capsys, "lineage", *arguments, "--json")[1])
    return {node["name"] for node in nodes if node["stale"]}


def test_a_workspace_says_what_dvc_would_make_anew_and_why(computed, monkeypatch, capsys):
    monkeypatch.chdir(computed)
    assert stale(capsys) == set()
    active = computed / "params" / "active.yaml"
    before = active.read_text()
    try:
        active.write_text(before.replace("1.0e-05", "2.0e-05"))
        assert stale(capsys) == {"recipe", "features", "evaluate"}
        code, out, _ = run(capsys, "lineage")
        made = version(locked_outs(read_lock(computed)["features"]))[:8]
        (line,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["features"]]
        assert code == 0 and line == ["features", made, "prepare", "stale"]
        assert run(capsys, "lineage", "--mermaid")[1].startswith("flowchart LR\n")
    finally:
        active.write_text(before)


def test_a_run_is_compared_with_the_workspace(computed, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    outs = {stage: locked_outs(entry) for stage, entry in read_lock(computed).items()} | {
        "teacher": {"out/t": "0" * 32}
    }
    tags = {"git.revision": "120883c" * 5, "recipe": "digits-cd"}
    with PipelineRun(Tracker(computed), "digits-cd · cd", tags, {}) as parent:
        parent.log_stages(outs)
    monkeypatch.chdir(computed)
    assert stale(capsys, "digits-cd") == {"code", "teacher"}
    nodes = json.loads(run(capsys, "lineage", "digits-cd", "--json")[1])
    found = {node["name"]: node["version"] for node in nodes}
    assert found["prepare"] == version(outs["prepare"])[:8] and found["teacher"] == "0" * 8
    assert "other here" in run(capsys, "lineage", "digits-cd")[1]
