"""Training states in flight: whole or absent, one worker at a time, nothing lost on a store's bad days."""

import os
import threading

import pytest

from flows.checkpoints import s3_store, store
from flows.checkpoints.s3_store import LeaseLost, Training
from flows.errors import UserError
from flows.storage import bucket
from flows.storage.bucket import Bucket
from flows.storage.digests import file_digest
from processes import wait_until
from s3_states import NAME, URI, Worker, head, needed, objects, save, steps, take_over


def test_a_folder_is_handed_on_and_dropped_when_its_outputs_are_stored(workers, monkeypatch):
    monkeypatch.delenv("CM_STATE", raising=False)
    with workers[0].hold() as held:
        save(held.folder, 1)
        held.publish()
    with workers[0].hold() as held:
        assert steps(held.folder) == [1]
        store.mark_finished(held.folder, {"out/student": "md5"})
        assert store.drop_finished(workers[0].folder, lambda outs: True) == [], "somebody holds it"
    assert store.drop_finished(workers[0].folder, lambda outs: False) == []
    assert store.drop_finished(workers[0].folder, lambda outs: outs == {"out/student": "md5"}) == [str(held.folder)]


def test_other_addresses_are_refused(workers, monkeypatch):
    monkeypatch.setenv("CM_STATE", "http://somewhere")
    with pytest.raises(UserError, match="http://somewhere: must be a folder of this machine or s3://bucket/prefix"):
        workers[0].hold().__enter__()


def test_a_state_travels_to_another_machine(s3, workers):
    first, second = workers
    with first.hold() as held:
        for step in (1, 2, 3):
            save(held.folder, step)
            held.publish()
    assert not held.folder.exists(), "the bucket has it all"
    with second.hold() as held:
        assert steps(held.folder) == [3]
        assert (held.folder / "log" / "metrics.jsonl").read_text() == "1\n2\n3\n"
        save(held.folder, 4)
    with first.hold() as held:
        assert steps(held.folder) == [4]
        assert (held.folder / "log" / "metrics.jsonl").read_text() == "1\n2\n3\n4\n"
    assert len(head(s3).states) == s3_store.KEPT
    assert objects(s3) == needed(s3), "nothing that no kept state needs is left"
    assert not first.said and not second.said and not second.waited


def test_a_state_is_in_the_bucket_before_the_training_ends(s3, workers):
    with workers[0].hold() as held:
        save(held.folder, 1)
        held.publish()
        wait_until(lambda: head(s3).states)
        assert head(s3).holder


def test_the_second_worker_waits_for_the_first(s3, workers, monkeypatch):
    monkeypatch.setattr(s3_store, "RENEWALS", 10 * s3_store.LEASE_SECONDS)
    order = []

    def second():
        with workers[1].hold() as held:
            order.append(("second", steps(held.folder)))

    with workers[0].hold() as held:
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: workers[1].waited)
        save(held.folder, 7)
        order.append(("first", [7]))
    thread.join()
    assert order == [("first", [7]), ("second", [7])]


@pytest.mark.slow
def test_of_many_workers_at_once_one_gets_the_lease(s3):
    trainings = [Training(Bucket(URI).below(NAME), print) for _ in range(8)]
    won = []

    def acquire(training):
        if training._try_acquire({"holder": str(id(training)), "who": "x"}):
            won.append(training)

    threads = [threading.Thread(target=acquire, args=[training]) for training in trainings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(id(training)) for training in won] == [head(s3).holder]


def test_a_worker_that_lost_its_lease_publishes_nothing_and_says_so(s3, workers, monkeypatch):
    first, second = workers
    with pytest.raises(LeaseLost, match="another worker has taken this training over"), first.hold() as held:
        save(held.folder, 1)
        held.publish()
        wait_until(lambda: head(s3).states)
        take_over(s3, monkeypatch)
        with second.hold() as other:
            assert steps(other.folder) == [1]
            save(other.folder, 2)
            other.publish()
            wait_until(lambda: len(head(s3).states) == 2)
            save(held.folder, 100)
            held.publish()
            wait_until(lambda: first.heard("taken this training over"))
            assert not second.heard("taken this training over")
        assert len(head(s3).states) == 2
        held.publish()
    assert second.heard("gave no sign")
    assert first.heard("publishes nothing more") and held.folder.exists(), "its own state is kept here"
    with Worker(second.folder).hold() as held:
        assert steps(held.folder) == [2]


@pytest.mark.slow
def test_a_late_prune_of_a_former_holder_harms_nothing(s3, workers, monkeypatch):
    """Between its last publication and its clean-up a worker stood still, and another has built on what it found."""
    prune = Training._prune
    late = []
    monkeypatch.setattr(Training, "_prune", lambda self: late.append(self))
    with pytest.raises(LeaseLost), workers[0].hold() as held:
        for step in (1, 2, 3):
            save(held.folder, step)
            held.publish()
            wait_until(lambda s=step: len(late) == s)
        take_over(s3, monkeypatch)
        with workers[1].hold() as other:
            save(other.folder, 4)
            other.publish()
            wait_until(lambda: len(late) == 4)
            prune(late[0])
            assert needed(s3) <= objects(s3)
        held.publish()
        wait_until(lambda: workers[0].heard("taken this training over"))
        held.publish()


@pytest.mark.slow
def test_a_killed_workers_local_state_that_is_newer_is_kept(s3, workers):
    with workers[0].hold() as held:
        save(held.folder, 1)
    save(held.folder, 5)  # saved, and killed before it reached the bucket
    with workers[0].hold() as held:
        assert steps(held.folder) == [5]
    with workers[1].hold() as held:
        assert steps(held.folder) == [5]


def test_finished_states_are_dropped_from_the_bucket_once_stored(s3, workers):
    with workers[0].hold() as held:
        save(held.folder, 1)
        store.mark_finished(held.folder, {"out/student": "md5"})
    assert head(s3).finished == {"out/student": "md5"} and head(s3).holder is None
    assert store.drop_finished(workers[1].folder, lambda outs: False) == []
    with workers[1].hold():
        assert store.drop_finished(workers[1].folder, lambda outs: True) == [], "somebody holds it"
    with workers[0].hold() as held:
        store.mark_finished(held.folder, {"out/student": "md5"})
    assert store.drop_finished(workers[1].folder, lambda outs: outs == {"out/student": "md5"}) == [NAME]
    assert s3.list_objects_v2(Bucket="states")["KeyCount"] == 0


def test_a_removal_takes_nothing_from_a_successor(s3, workers, monkeypatch):
    """Between the emptied head and the removal another worker begins, and publishes."""
    with workers[0].hold() as held:
        save(held.folder, 1)
    write, successor = Bucket.write, Training(Bucket(f"{URI}/{NAME}"), print)

    def begin_after(self, key, data, *, replacing):
        etag = write(self, key, data, replacing=replacing)
        monkeypatch.setattr(Bucket, "write", write)
        successor.acquire(lambda: None)
        folder = workers[1].folder / "fresh"
        save(folder, 7)
        successor.publish(folder)
        return etag

    monkeypatch.setattr(Bucket, "write", begin_after)
    assert not s3_store.remove_training(Bucket(f"{URI}/{NAME}"))
    assert needed(s3) and needed(s3) == objects(s3), "what the successor published is whole, the rest is gone"
    successor.update()  # its lease is still its own


def test_a_large_file_travels_in_parts(s3, monkeypatch, tmp_path):
    monkeypatch.setattr(bucket, "PART", 5 * 2**20)
    path, counted = tmp_path / "large", []
    path.write_bytes(os.urandom(12 * 2**20 + 17))
    Bucket(URI).upload(path, "large", counted.append)
    assert sum(counted) == path.stat().st_size
    stored = s3.head_object(Bucket="states", Key="in flight/large", ChecksumMode="ENABLED")
    assert stored["ETag"].endswith('-3"') and stored["ChecksumSHA256"]
    Bucket(URI).download("large", tmp_path / "again", file_digest(path))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_store_whose_etags_are_no_md5_is_read_back(s3, monkeypatch, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    monkeypatch.setattr(bucket, "_etag", lambda path: "something else")
    Bucket(URI).upload(path, "file")
    assert s3.get_object(Bucket="states", Key="in flight/file")["Body"].read() == b"abc"
