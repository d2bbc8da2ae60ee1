"""DVC as a team uses it: remotes that others reach, work that nobody repeats, readable differences."""

import json
import subprocess
import sys
from datetime import timedelta

import pytest

from command import run as cm
from fault_proxy import error, fault_proxy
from flows.commands import doctor
from flows.operations import garbage
from flows.operations.garbage import QUARANTINE, object_key
from flows.storage.folder import open_store
from flows.tracking.tracker import Tracker
from flows.workspace import clone, locations
from flows.workspace.dvc_files import dvc_md5, load_yaml, locked_outs, update_lock
from flows.workspace.store_users import USERS
from miniature import REPOSITORY, commit, git, make_workspace, two_machines
from servers import point_aws_at, shared_s3

pytestmark = pytest.mark.slow


def dvc(root, *arguments):
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


s3 = shared_s3("team")


@pytest.fixture
def machines(tmp_path):
    return two_machines(make_workspace(tmp_path / "first"))


def share(root, url):
    (root / ".dvc" / "config.local").write_text(f"[core]\n    remote = team\n['remote \"team\"']\n    url = {url}\n")


def reproduce(root, name, *stages):
    """Bring stages up in a run of its own; return {stage: result}."""
    with clone.clone(root, name) as run:
        results = {stage: run.reproduce(stage) for stage in stages}
        for result in results.values():
            outs = locked_outs(result.entry)
            assert outs == {path: dvc_md5(run.root / path) for path in outs}
    return results


def test_a_worker_that_has_nothing_takes_everything_from_the_remote(machines, s3, caplog, tmp_path):
    first, second = machines
    for root in machines:
        share(root, f"s3://team/{tmp_path.name}")
    made = reproduce(first, "first", "prepare", "teacher")
    assert not any(result.cached for result in made.values()) and "not pushed" not in caplog.text
    found = reproduce(second, "second", "prepare", "teacher")
    assert all(result.cached for result in found.values())
    outs = [{stage: locked_outs(result.entry) for stage, result in results.items()} for results in (found, made)]
    assert outs[0] == outs[1]


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_remote_loses_nothing_that_others_need_and_nothing_at_once(machines, s3, kind, tmp_path, monkeypatch, capsys):
    """Two workspaces push to one remote, each with an MLflow of its own."""
    for name in ("CM_HOME", "CM_STATE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    first, second = machines
    url = {"bucket": f"s3://team/{tmp_path.name}", "folder": str(tmp_path / "remote")}[kind]
    remote = open_store(url)
    for root in machines:
        share(root, url)
        made = reproduce(root, "run", "prepare", "teacher")
    monkeypatch.chdir(first)
    collect = ["gc", "--remote", "--older-than", "0", "--apply"]
    objects = {entry.key for entry in remote.entries("files/")}

    def stored(folder=""):
        return {entry.key.removeprefix(folder) for entry in remote.entries(f"{folder}files/")}

    code, _, said = cm(capsys, *collect)
    assert code == 2 and f"{second}/mlflow.db with {first}, last on " in said and "nothing is removed" in said
    assert objects and stored() == objects

    (theirs,) = (one.key for one in remote.entries(USERS) if f"{second}/" in remote.contents(one.key).decode())
    remote.remove([theirs])
    code, said, _ = cm(capsys, *collect)
    assert code == 0 and "`cm gc --undo` brings them back" in said
    assert not stored() and stored(QUARANTINE) == objects
    assert " objects brought back" in cm(capsys, "gc", "--undo")[1] and stored() == objects

    cm(capsys, *collect)
    update_lock(first, {"prepare": made["prepare"].entry})  # needed again
    cm(capsys, *collect)
    assert stored() < objects and stored() | stored(QUARANTINE) == objects
    assert {object_key(md5) for md5 in locked_outs(made["prepare"].entry).values()} <= stored()
    kept = stored()
    monkeypatch.setattr(garbage, "QUARANTINED", timedelta(0))
    cm(capsys, *collect)
    assert stored() == kept and not stored(QUARANTINE), "its time is over"


def test_the_workspaces_own_remote_is_nobody_elses(machines):
    first, _ = machines
    assert locations.shared_remote(first) is None
    share(first, "s3://team/x")
    assert locations.shared_remote(first) == "s3://team/x"
    with clone.clone(first, "run") as run:
        assert locations.shared_remote(run.root) == "s3://team/x"
        text = (run.root / ".dvc" / "config.local").read_text()
        assert text.lower().count("verify = true") == text.count("url =") == 2


def test_a_remote_that_fails_loses_nothing_and_is_tried_again(machines, s3, monkeypatch, caplog, tmp_path):
    first, second = machines
    url = f"s3://team/{tmp_path.name}"
    with fault_proxy(s3.meta.endpoint_url) as proxy:
        point_aws_at(monkeypatch, proxy.url)
        for root in machines:
            share(root, url)
        proxy.strike(error(403, "AccessDenied"), method="PUT")
        with clone.clone(first, "first") as run:
            assert not run.reproduce("prepare").cached
            (complaint,) = [line for line in caplog.messages if "not pushed" in line]
            assert url in complaint and "AccessDenied" in complaint
            proxy.heal()
            run.push_again()
        assert caplog.text.count("not pushed") == 1
        found = reproduce(second, "second", "prepare")
        assert found["prepare"].cached


def test_damaged_bytes_in_a_remote_are_never_taken_for_a_result(machines, tmp_path):
    first, second = machines
    remote = tmp_path / "remote"
    for root in machines:
        share(root, str(remote))
    reproduce(first, "first", "prepare")
    for file in (remote / "files").rglob("*"):
        if file.is_file() and not file.name.endswith(".dir"):
            file.chmod(0o644)
            file.write_bytes(file.read_bytes() + b"x")
    results = reproduce(second, "second", "prepare")
    assert not results["prepare"].cached, "computed again, and right"


def with_plots(root):
    """Let the miniature's evaluation write a table of FIDs, and DVC show it as the real pipeline says."""
    pipeline = load_yaml(root / "dvc.yaml")
    pipeline["stages"]["evaluate"]["plots"] = ["out/evaluate/plots"]
    pipeline["plots"] = load_yaml(REPOSITORY / "dvc.yaml")["plots"]
    (root / "dvc.yaml").write_text(json.dumps(pipeline))
    with (root / "stage.py").open("a") as script:
        script.write(PLOTS)
    git(root, "add", "--all")
    commit(root)


PLOTS = """
if name == "evaluate":
    (out / "plots").mkdir()
    fid = json.loads((out / "metrics.json").read_text())["fid_classifier"]
    rows = "".join(f"{row},{value}\\n" for row, value in fid.items())
    (out / "plots" / "fid.csv").write_text("row,fid\\n" + rows)
    (out / "plots" / "loss.png").write_bytes(b"a picture, say")
"""


def test_differences_of_an_experiment_are_readable(machines, tmp_path):
    first, _ = machines
    (first / "stage.py").write_text("import json\n" + (first / "stage.py").read_text())
    with_plots(first)
    dvc(first, "repro")
    git(first, "add", "--all")
    commit(first)
    text = (first / "stage.py").read_text().replace('"nfe_1": 2.5', '"nfe_1": 1.25')
    (first / "stage.py").write_text(text)
    dvc(first, "exp", "run", "-n", "better", "-S", "params/active.yaml:seed=2")
    rows = json.loads(dvc(first, "metrics", "diff", "HEAD", "better", "--json"))
    changed = rows["out/evaluate/metrics.json"]["fid_classifier.nfe_1"]
    assert (changed["old"], changed["new"], changed["diff"]) == (2.5, 1.25, -1.25)
    assert "| fid_classifier.nfe_1 | 2.5    | 1.25     | -1.25    |" in dvc(
        first, "metrics", "diff", "HEAD", "better", "--md"
    )
    assert "better" in dvc(first, "exp", "show", "--md")

    shown = json.loads(dvc(first, "plots", "diff", "HEAD", "better", "--json"))["data"]
    (bars,) = shown["FID of every row of images"]
    assert bars["revisions"] == ["HEAD", "better"]
    assert bars["content"]["mark"]["type"] == "bar" and bars["content"]["encoding"]["y"]["field"] == "row"
    drawn = {(value["rev"], value["row"], float(value["fid"])) for value in bars["content"]["data"]["values"]}
    assert drawn >= {("HEAD", "nfe_1", 2.5), ("better", "nfe_1", 1.25)}
    assert [picture["type"] for picture in shown["out/evaluate/plots/loss.png"]] == ["image", "image"]
    dvc(first, "plots", "diff", "HEAD", "better", "--out", str(tmp_path / "page"))
    assert "FID of every row of images" in (tmp_path / "page" / "index.html").read_text()


def test_doctor_proves_every_store_in_one_bucket(machines, s3, monkeypatch, tmp_path, capsys):
    from prefect.blocks.core import Block
    from prefect.filesystems import RemoteFileSystem
    from prefect.settings import PREFECT_DEFAULT_RESULT_STORAGE_BLOCK, temporary_settings

    first, _ = machines
    url = f"s3://team/{tmp_path.name}"
    share(first, f"{url}/dvc")
    monkeypatch.chdir(first)
    monkeypatch.setenv("CM_STATE", f"{url}/states")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{first}/mlflow.db")
    Tracker(first).client.create_experiment("in the bucket", artifact_location=f"{url}/artifacts")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "in the bucket")
    monkeypatch.setattr(Block, "load", lambda slug: RemoteFileSystem(basepath=f"{url}/results"))
    names = ("DVC remote", "MLflow artifacts", "Prefect results", "training states")
    with (
        fault_proxy(s3.meta.endpoint_url) as proxy,
        temporary_settings({PREFECT_DEFAULT_RESULT_STORAGE_BLOCK: "remote-file-system/results"}),
    ):
        point_aws_at(monkeypatch, proxy.url)
        checks = [doctor._examine(name, doctor.WORKSPACE[name]) for name in names]
        assert all(check["ok"] and "written, read and removed" in check["says"] for check in checks), checks
        assert s3.list_objects_v2(Bucket="team", Prefix=tmp_path.name)["KeyCount"] == 0, "nothing is left behind"
        proxy.strike(error(403, "AccessDenied"), method="PUT")
        checks = [doctor._examine(name, doctor.WORKSPACE[name]) for name in names]
    assert not any(check["ok"] for check in checks), checks
    assert all("denied" in check["says"].lower() or "as told" in check["says"] for check in checks), checks
