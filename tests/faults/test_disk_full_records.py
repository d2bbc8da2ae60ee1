"""A full disk under records: nothing half-written is taken for whole, and with space it goes on.

Of hashes, of MLflow's runs, of results that a team shares, of Prefect's runs.
"""

import sqlite3
from pathlib import Path
from shutil import rmtree

import pytest
from prefect.client.orchestration import get_client

from disks import fill
from flows.atomic import replace_text
from flows.errors import UserError, is_disk_full
from flows.orchestration.embedded import embedded_prefect
from flows.storage import digests
from flows.storage.digests import file_digest, recorded_digest
from flows.tracking.pipeline_run import PipelineRun
from flows.tracking.stage_run import StageRun
from flows.tracking.tracker import Tracker
from flows.workspace import clone
from flows.workspace.dvc_files import Cache, file_md5, locked_outs
from miniature import commit, make_workspace
from small_stages import files, run_small, small_recipe

RESULT = 'if name == "teacher":\n    (out / "ema.safetensors").write_bytes(os.urandom(6 << 20))\n'


@pytest.fixture(autouse=True)
def own_records(monkeypatch):
    for name in ("CM_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_without_space_for_the_record_files_are_read_each_time(disk, tmp_path, caplog, monkeypatch):
    path, record, read = tmp_path / "file", disk.folder / "hashes.db", []
    path.write_bytes(b"bytes")
    monkeypatch.setattr(digests, "file_digest", lambda *file: read.append(file) or file_digest(*file))
    fill(disk.folder)
    for _ in range(2):
        assert recorded_digest(record, path, "md5") == file_md5(path)
    (said,) = caplog.messages
    assert said.startswith(f"{record}: hashes are not recorded") and len(read) == 2
    disk.grow()
    for _ in range(2):
        assert recorded_digest(record, path, "md5") == file_md5(path)
    assert len(read) == 3


def sound(database):
    (answer,) = sqlite3.connect(database).execute("pragma integrity_check").fetchone()
    return answer == "ok"


def test_a_text_is_replaced_whole_or_not_at_all(disk):
    path = disk.folder / "page.html"
    replace_text(path, "old")
    fill(disk.folder)
    with pytest.raises(OSError, match="No space left on device"):
        replace_text(path, "new" * 2**20)
    assert path.read_text() == "old" and {file.name for file in disk.folder.iterdir()} == {"page.html", "ballast"}
    disk.grow()
    replace_text(path, "new")
    assert path.read_text() == "new"


def test_an_evaluation_is_written_whole_or_fails(disk, tmp_path):
    recipe = small_recipe("digits-cd", "features.num_steps=10", "data.max_images=300")
    for stage in ("prepare", "features", "teacher", "student", "sample", "edit", "evaluate"):
        run_small(stage, recipe, tmp_path)
    whole, out = files(tmp_path / "evaluate"), disk.folder / "evaluate"
    page = len(whole[Path("report.html")])
    for leave in (0, page // 2, sum(map(len, whole.values())) - page // 2):
        fill(disk.folder, leave)
        with pytest.raises(Exception) as refused:
            run_small("evaluate", recipe, tmp_path, out_dir=out)
        assert is_disk_full(refused.value), refused.value
        assert not (out / "report.html").exists()
        rmtree(out)
    disk.grow()
    run_small("evaluate", recipe, tmp_path, out_dir=out)
    assert files(out) == whole


def test_a_run_without_space_for_prefects_history_is_refused(disk, tmp_path):
    (tmp_path / ".cm").symlink_to(disk.folder)
    fill(disk.folder)
    with (
        pytest.raises(UserError, match=r"\.cm/prefect: No space left on device; Prefect keeps"),
        embedded_prefect(tmp_path),
    ):
        pass


@pytest.mark.slow
def test_a_run_that_meets_no_space_for_prefects_history_names_it(disk, tmp_path):
    (tmp_path / ".cm").symlink_to(disk.folder)
    disk.grow()
    refused = pytest.raises(UserError, match=r"\.cm/prefect: No space left on device; Prefect keeps")
    with refused, embedded_prefect(tmp_path), get_client(sync_client=True) as client:
        fill(disk.folder)
        for number in range(1000):
            client.create_flow_from_name(f"flow {number}")
    assert sound(disk.folder / "prefect" / "prefect.db")


@pytest.mark.slow
def test_a_run_without_space_for_its_record_is_refused(disk):
    tracker = Tracker(disk.folder)
    with PipelineRun(tracker, "before", {"recipe": "mine"}, {}):
        pass
    fill(disk.folder)
    with pytest.raises(Exception) as refused:
        with PipelineRun(tracker, "full", {"recipe": "mine"}, {f"key{number}": "x" * 200 for number in range(90)}):
            pass
    assert is_disk_full(refused.value) and sound(disk.folder / "mlflow.db")
    disk.grow()
    with PipelineRun(tracker, "after", {"recipe": "mine"}, {}):
        pass
    ended = {run.info.run_name: run.info.status for run in tracker.client.search_runs([tracker.experiment_id])}
    assert ended.pop("full", "FAILED") in ("FAILED", "RUNNING") and ended == {"before": "FINISHED", "after": "FINISHED"}


@pytest.mark.slow
def test_a_training_goes_on_while_its_record_has_no_space(disk):
    tracker = Tracker(disk.folder)
    with StageRun(disk.folder, "teacher", None, lambda: {"recipe": "mine"}) as stage:
        stage.metrics({"loss": 1.0}, 0)
        stage._written[-1][1].result()
        fill(disk.folder)
        for step in range(1, 1000):
            stage.metrics({f"loss{number}": 1.0 for number in range(20)}, step)
        last = stage._written[-1][1]
        assert last.exception() is not None, "the disk is full"
        disk.grow()
    assert {len(tracker.client.get_metric_history(stage._run_id, f"loss{number}")) for number in range(20)} == {999}
    assert sound(disk.folder / "mlflow.db")


@pytest.mark.slow
def test_a_result_that_finds_no_space_at_the_remote_is_pushed_later(disk, tmp_path, caplog):
    root = make_workspace(tmp_path / "workspace")
    with (root / "stage.py").open("a") as script:
        script.write(RESULT)
    commit(root)
    remote = f"[core]\n    remote = team\n['remote \"team\"']\n    url = {disk.folder}/remote\n"
    (root / ".dvc" / "config.local").write_text(remote)
    at_remote = Cache(disk.folder / "remote")
    with clone.clone(root, "full") as run:
        run.reproduce("prepare")
        outs = locked_outs(run.reproduce("teacher").entry)
        (said,) = [line for line in caplog.messages if "not pushed" in line]
        assert "No space left on device" in said and said.startswith("teacher: ")
        assert not at_remote.holds(outs) and Cache(root / ".dvc/cache").holds(outs)
        objects = at_remote.objects()
        assert all(file_md5(file) == (file.parent.name + file.name).removesuffix(".dir") for file in objects)
        disk.grow()
        run.push_again()
    assert at_remote.holds(outs)
