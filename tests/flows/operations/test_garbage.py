"""`cm gc` removes what nothing refers to, and never more."""

import hashlib
import json
import random
import subprocess
from datetime import timedelta

import pytest
import yaml

from command import run
from flows.checkpoints import s3_store, store
from flows.errors import UserError
from flows.operations import garbage
from flows.operations.garbage import find_garbage, object_key
from flows.storage.bucket import Bucket
from flows.tracking.sqlite_reads import data_versions
from flows.tracking.tracker import Tracker
from flows.workspace import clone
from flows.workspace.dvc_files import version
from miniature import commit, git, make_workspace
from servers import s3_server

ALL_AGES = timedelta(0)


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("CM_HOME", "CM_STATE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return make_workspace(tmp_path / "workspace")


class Maker:
    """Fills a store with results of invented stages; knows what each consists of."""

    def __init__(self, store, seed):
        self.store, self.random = store, random.Random(seed)

    def _put(self, data, suffix=""):
        md5 = hashlib.md5(data).hexdigest() + suffix
        path = self.store / object_key(md5)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return md5

    def result(self):
        """Make a file or a folder; return (hash for a lock, all objects that it needs)."""
        files = [self._put(self.random.randbytes(20)) for _ in range(self.random.randint(1, 4))]
        if len(files) == 1:
            return files[0], set(files)
        listing = [{"md5": md5, "relpath": str(index)} for index, md5 in enumerate(files)]
        folder = self._put(json.dumps(listing).encode(), ".dir")
        return folder, {folder, *files}

    def run_cache(self, *results):
        entry = {"cmd": "x", "outs": [{"path": f"out/{i}", "md5": md5} for i, (md5, _) in enumerate(results)]}
        path = self.store / "runs" / "ab" / str(self.random.random()) / "cd"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(entry))
        return path, version({out["path"]: out["md5"] for out in entry["outs"]})


def write_lock(folder, md5):
    lock = {"schema": "2.0", "stages": {"a": {"cmd": "x", "outs": [{"path": "out/a", "md5": md5}]}}}
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))


def objects_of(found, kind="cache"):
    keys = {one.what for one in found if one.kind == kind and one.what.startswith("files/")}
    return {key.removeprefix("files/md5/").replace("/", "") for key in keys}


@pytest.mark.parametrize("seed", range(4))
def test_what_git_and_running_flows_refer_to_survives(root, seed):
    maker = Maker(root / ".dvc" / "cache", seed)
    needed = set()

    def committed(*place):
        md5, objects = maker.result()
        write_lock(root, md5)
        git(root, "add", "--all")
        commit(root)
        if place:
            git(root, *place)
            git(root, "reset", "--quiet", "--hard", "HEAD~")
        needed.update(objects)

    committed()
    committed("branch", "other")
    committed("tag", "light")
    committed("-c", "user.name=t", "-c", "user.email=t@localhost", "tag", "-a", "-m", "heavy", "heavy")
    committed("update-ref", "refs/exps/ab/cdef/name", "HEAD")
    committed("update-ref", "refs/remotes/origin/theirs", "HEAD")
    for _ in range(2):
        md5, objects = maker.result()
        write_lock(root, md5)
        git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "stash")
        needed |= objects
    md5, objects = maker.result()
    (root / "data").mkdir()
    (root / "data" / "photos.zip.dvc").write_text(yaml.safe_dump({"outs": [{"path": "photos.zip", "md5": md5}]}))
    needed |= objects
    garbage_objects = set.union(*(maker.result()[1] for _ in range(5))) - needed
    with clone.clone(root, "going on") as running:
        md5, objects = maker.result()
        write_lock(running.root, md5)
        needed |= objects
        found = list(find_garbage(root, older_than=ALL_AGES, with_remote=False))
        assert objects_of(found) == garbage_objects
        assert not [one for one in found if one.kind != "cache"]
        assert not list(find_garbage(root, older_than=timedelta(hours=1), with_remote=False)), "all of it is young"
        for one in found:
            one.remove()
        assert not list(find_garbage(root, older_than=ALL_AGES, with_remote=False))
    there = {f"{path.parent.name}{path.name}" for path in (root / ".dvc/cache/files/md5").rglob("*") if path.is_file()}
    assert there == needed


def test_run_cache_entries_go_with_what_they_made(root):
    maker = Maker(root / ".dvc" / "cache", 0)
    kept, gone = maker.result(), maker.result()
    write_lock(root, kept[0])
    (kept_entry, _), (gone_entry, _) = maker.run_cache(kept), maker.run_cache(gone)
    for one in find_garbage(root, older_than=ALL_AGES, with_remote=False):
        one.remove()
    assert kept_entry.exists() and not gone_entry.exists()


def test_damaged_objects_that_were_set_aside_go_in_time(root):
    aside = root / ".dvc/cache/damaged/abc"
    aside.parent.mkdir(parents=True)
    aside.write_bytes(b"damaged")
    assert not list(find_garbage(root, older_than=timedelta(days=1), with_remote=False))
    (found,) = find_garbage(root, older_than=ALL_AGES, with_remote=False)
    found.remove()
    assert (found.kind, found.size) == ("damaged", 7) and not aside.exists()


def test_the_remote_is_touched_on_request_alone(root):
    maker = Maker(root / ".cm" / "remote", 0)
    _, objects = maker.result()
    assert not list(find_garbage(root, older_than=ALL_AGES, with_remote=False))
    found = list(find_garbage(root, older_than=ALL_AGES, with_remote=True))
    assert objects_of(found, "remote") == objects


def test_a_listing_that_only_the_remote_has_still_protects_its_files(root):
    cache, remote = Maker(root / ".dvc" / "cache", 1), Maker(root / ".cm" / "remote", 1)
    folder = ""
    while not folder.endswith(".dir"):  # the same results in both
        (folder, objects), _ = cache.result(), remote.result()
    write_lock(root, folder)
    (root / ".dvc" / "cache" / object_key(folder)).unlink()
    assert not objects & objects_of(find_garbage(root, older_than=ALL_AGES, with_remote=True))


def test_states_and_clones_go_when_nobody_will_go_on_with_them(root, monkeypatch):
    monkeypatch.setattr(garbage, "ORPHANED", ALL_AGES)
    with pytest.raises(ZeroDivisionError), clone.clone(root, "failed") as failed:
        raise ZeroDivisionError
    with clone.clone(root, "live") as live, store.hold_checkpoint(root, "student", "k" * 16, print, print) as held:
        (held.folder / "step-000000001").mkdir()
        (store.states_folder(root) / "old").mkdir()
        found = list(find_garbage(root, older_than=ALL_AGES, with_remote=False))
        assert [one.what for one in found if one.kind == "clone"] == [str(failed.folder)]
        for one in found:
            one.remove()
        assert live.folder.exists() and held.folder.exists()
        assert not failed.folder.exists() and not (store.states_folder(root) / "old").exists()


def test_the_command_lists_and_removes_only_when_told(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    _, objects = Maker(root / ".dvc" / "cache", 2).result()
    code, out, _ = run(capsys, "gc", "--older-than", "0", "--json")
    answer = json.loads(out)
    assert code == 0 and not answer["removed"] and len(answer["garbage"]) == len(objects)
    code, out, _ = run(capsys, "gc", "--older-than", "0", "--apply")
    assert code == 0 and f"{len(objects)} things" in out
    code, out, _ = run(capsys, "gc", "--older-than", "0")
    assert "0 things" in out
    assert run(capsys, "gc", "--older-than", "soon")[0] == 2


@pytest.mark.slow
def test_what_mlflow_knows_survives_and_its_silence_is_no_permission(root, monkeypatch):
    maker = Maker(root / ".dvc" / "cache", 3)
    by_run, by_model, by_registered, several = maker.result(), maker.result(), maker.result(), [maker.result()] * 2
    forgotten = maker.result()
    for result in (by_run, by_model, by_registered):
        maker.run_cache(result)
    _, digest = maker.run_cache(*several)
    tracker = Tracker(root)
    client = tracker.client
    runs = [client.create_run(tracker.experiment_id).info.run_id for _ in range(3)]
    tracker.set_tags(runs[0], {"dvc.out.teacher": by_run[0], "dvc.out": digest})
    client.create_logged_model(tracker.experiment_id, "student", tags={"dvc.out": by_model[0]})
    tracker.set_tags(runs[1], {"dvc.out": by_registered[0]})
    client.create_registered_model("student")
    client.create_model_version("student", source="file:///elsewhere", run_id=runs[1])
    client.delete_run(runs[1])
    tracker.set_tags(runs[2], {"dvc.out": forgotten[0]})
    client.delete_run(runs[2])
    assert data_versions(root / "mlflow.db") == tracker.data_versions(), "read without MLflow, the same"
    gone = objects_of(find_garbage(root, older_than=ALL_AGES, with_remote=False))
    assert gone == forgotten[1] - set.union(*(objects for _, objects in (by_run, by_model, by_registered, *several)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="127.0.0.1:9"):
        list(find_garbage(root, older_than=ALL_AGES, with_remote=False))


@pytest.mark.slow
def test_a_bucket_loses_orphans_and_torn_uploads_alone(root, monkeypatch):
    with s3_server(monkeypatch, "states") as client:
        monkeypatch.setenv("CM_STATE", "s3://states/x")
        monkeypatch.setattr(garbage, "ORPHANED", ALL_AGES)
        upload = client.create_multipart_upload(Bucket="states", Key="x/a/objects/1")["UploadId"]
        client.upload_part(Bucket="states", Key="x/a/objects/1", UploadId=upload, PartNumber=1, Body=b"part")
        with store.hold_checkpoint(root, "student", "k" * 16, print, print) as held:
            (held.folder / "step-000000001").mkdir()
            (held.folder / "step-000000001" / "state.json").write_text("{}")
        monkeypatch.setattr(s3_store, "is_orphan", lambda place, seconds: True)  # its lease would run for a minute
        with store.hold_checkpoint(root, "teacher", "k" * 16, print, print):
            found = list(find_garbage(root, older_than=ALL_AGES, with_remote=False))
            assert {one.kind for one in found} == {"state", "torn upload"}
            for one in found:
                one.remove()
            left = {entry.key for entry in Bucket("s3://states/x").entries()}
        assert left == {"teacher-kkkkkkkkkkkkkkkk/head.json"}, "somebody holds it"
        assert not client.list_multipart_uploads(Bucket="states").get("Uploads")


def test_git_that_cannot_be_asked_ends_the_search(tmp_path):
    with pytest.raises(UserError, match="git for-each-ref failed"):
        list(find_garbage(tmp_path, older_than=ALL_AGES, with_remote=False))
    assert subprocess.run(["git", "status"], cwd=tmp_path, capture_output=True, check=False).returncode
