"""Training states in flight: whole or absent, one worker at a time, nothing lost on a store's bad days."""

import json
import os
import threading
import time

import boto3
import pytest

from fault_proxy import (
    alter_answer,
    alter_request,
    cut_answer,
    cut_body,
    cut_request,
    error,
    fault_proxy,
    shift_clock,
    slow,
)
from flows.checkpoints import s3_store, store
from flows.checkpoints.s3_store import HEAD, Head, LeaseLost, Training
from flows.errors import UserError
from flows.storage import bucket
from flows.storage.bucket import Bucket
from flows.storage.fetch import file_digest
from s3_states import KEY, NAME, URI, take_over
from servers import point_aws_at, shared_s3

server = shared_s3("states")


@pytest.fixture
def s3(server, monkeypatch):
    """An empty bucket, states in it, no long waits."""
    for entry in server.list_objects_v2(Bucket="states").get("Contents", ()):
        server.delete_object(Bucket="states", Key=entry["Key"])
    monkeypatch.setenv("CM_STATE", URI)
    monkeypatch.setattr(s3_store, "PATIENCE", (0.05,))
    monkeypatch.setattr(store, "RETRY_EVERY", 0.1)
    return server


@pytest.fixture
def proxy(s3, monkeypatch):
    with fault_proxy(s3.meta.endpoint_url) as proxy:
        point_aws_at(monkeypatch, proxy.url)
        yield proxy


class Worker:
    """A machine with a workspace of its own; what it is told is kept."""

    def __init__(self, folder):
        self.folder, self.said, self.waited = folder, [], 0

    def hold(self):
        return store.hold_checkpoint(self.folder, "student", KEY, self.on_wait, self.said.append)

    def on_wait(self):
        self.waited += 1

    def heard(self, part):
        return any(part in line for line in self.said)


@pytest.fixture
def workers(tmp_path):
    return [Worker(tmp_path / name) for name in "ab"]


def save(folder, step, *, size=2000):
    """Save a state as a training does: built aside, renamed; the log is appended to."""
    final = folder / f"step-{step:09d}"
    partial = folder / ".partial"
    partial.mkdir(parents=True)
    (partial / "tensors.safetensors").write_bytes(bytes([step % 256]) * size)
    (partial / "state.json").write_text(json.dumps({"step": step}))
    os.replace(partial, final)
    (folder / "log").mkdir(exist_ok=True)
    with (folder / "log" / "metrics.jsonl").open("a") as file:
        file.write(f"{step}\n")


def steps(folder):
    found = sorted(path for path in folder.glob("step-*"))
    for path in found:
        number = int(path.name.removeprefix("step-"))
        assert json.loads((path / "state.json").read_text()) == {"step": number}
        assert set((path / "tensors.safetensors").read_bytes()) == {number % 256}
    return [int(path.name.removeprefix("step-")) for path in found]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def head(client, name=NAME):
    answer = client.get_object(Bucket="states", Key=f"in flight/{name}/{HEAD}")
    return Head.of(answer["Body"].read())


def objects(client):
    listed = client.list_objects_v2(Bucket="states").get("Contents", ())
    return {entry["Key"] for entry in listed if not entry["Key"].endswith(HEAD)}


def needed(client):
    """The keys that the states of all heads need."""
    found = set()
    for name in head(client).states:
        place = f"in flight/{NAME}"
        found.add(f"{place}/{name}")
        files = json.loads(client.get_object(Bucket="states", Key=f"{place}/{name}")["Body"].read())
        found |= {f"{place}/{stored['key']}" for stored in files.values()}
    return found


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
        wait_for(lambda: head(s3).states)
        assert head(s3).holder


def test_the_second_worker_waits_for_the_first(s3, workers, monkeypatch):
    monkeypatch.setattr(s3_store, "LEASE_SECONDS", 6.0)
    order = []

    def second():
        with workers[1].hold() as held:
            order.append(("second", steps(held.folder)))

    with workers[0].hold() as held:
        thread = threading.Thread(target=second)
        thread.start()
        wait_for(lambda: workers[1].waited)
        save(held.folder, 7)
        order.append(("first", [7]))
    thread.join(20)
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
        wait_for(lambda: head(s3).states)
        take_over(s3, monkeypatch)
        with second.hold() as other:
            assert steps(other.folder) == [1]
            save(other.folder, 2)
            other.publish()
            wait_for(lambda: len(head(s3).states) == 2)
            save(held.folder, 100)
            held.publish()
            wait_for(lambda: first.heard("taken this training over"))
            assert not second.heard("taken over by")
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
            wait_for(lambda s=step: len(late) == s)
        take_over(s3, monkeypatch)
        with workers[1].hold() as other:
            save(other.folder, 4)
            other.publish()
            wait_for(lambda: len(late) == 4)
            prune(late[0])
            assert needed(s3) <= objects(s3)
        held.publish()
        wait_for(lambda: workers[0].heard("taken this training over"))
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


PASSING = {
    "500": error(500, "InternalError"),
    "503": error(503, "ServiceUnavailable"),
    "throttled": error(503, "SlowDown"),
    "connection cut before the request": cut_request,
    "answer lost": cut_answer,
    "slow": slow(0.3),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
@pytest.mark.slow
def test_faults_that_pass_are_not_even_noticed(proxy, workers, fault):
    """A request of each kind fails once; the client tries again."""
    first, second = workers
    with first.hold() as held:
        for method in ("PUT", "HEAD", "GET", "POST"):
            proxy.strike(fault, method=method, times=1)
        save(held.folder, 1)
        held.publish()
        save(held.folder, 2)
    for method in ("PUT", "HEAD", "GET", "POST"):
        proxy.strike(fault, method=method, times=1)
    with second.hold() as held:
        assert steps(held.folder) == [2]
    assert not first.heard("machine alone") and not first.heard("taken")


LASTING = {
    "500": (error(500, "InternalError"), "InternalError"),
    "throttled": (error(503, "SlowDown"), "slow down"),
    "denied": (error(403, "AccessDenied"), "access denied"),
    "no space": (error(507, "507"), "no space left in the store"),
    "too large": (error(400, "EntityTooLarge"), "no objects as large"),
    "clocks differ": (error(403, "RequestTimeTooSkewed"), "clock of this machine"),
    "cut": (cut_request, "closed"),
}


@pytest.mark.parametrize(("fault", "says"), LASTING.values(), ids=LASTING)
@pytest.mark.slow
def test_the_training_outlives_the_store_and_says_where_its_state_is(proxy, workers, fault, says):
    first = workers[0]
    with first.hold() as held:
        save(held.folder, 1)
        held.publish()
        wait_for(lambda: head(boto3.client("s3")).states)
        proxy.strike(fault, method="PUT")
        save(held.folder, 2)
        held.publish()
        wait_for(lambda: first.heard("training continues"))
    assert first.heard(says), first.said
    assert first.heard(f"is on this machine alone, in {held.folder}") and steps(held.folder) == [1, 2]
    proxy.heal()
    take_over(boto3.client("s3"), None)
    with first.hold() as held:
        assert steps(held.folder) == [1, 2]
    with workers[1].hold() as held:
        assert steps(held.folder) == [2]


@pytest.mark.slow
def test_a_store_that_comes_back_gets_the_newest_state(proxy, workers):
    worker = workers[0]
    with worker.hold() as held:
        proxy.strike(error(500, "InternalError"), method="PUT")
        for step in (1, 2, 3):
            save(held.folder, step)
            held.publish()
        wait_for(lambda: worker.heard("training continues"))
        proxy.heal()
        wait_for(lambda: worker.heard("works again"))
        assert len(head(boto3.client("s3")).states) == 1, "of the waiting states only the newest was sent"
    with workers[1].hold() as held:
        assert steps(held.folder) == [3]


@pytest.mark.slow
def test_a_worker_does_not_begin_where_the_store_cannot_be_asked(proxy, workers):
    for fault, says in (LASTING["denied"], LASTING["500"], LASTING["cut"]):
        proxy.strike(fault)
        with pytest.raises(UserError, match=says) as refused, workers[0].hold():
            pass
        assert "\n" not in str(refused.value) and URI in str(refused.value)
        proxy.heal()


@pytest.mark.slow
def test_bytes_altered_on_the_way_up_never_become_a_state(proxy, workers):
    with workers[0].hold() as held:
        proxy.strike(alter_request, method="PUT", path="objects", times=3)
        save(held.folder, 1)
        held.publish()
        wait_for(lambda: head(boto3.client("s3")).states)
    assert workers[0].heard("checksum")
    with workers[1].hold() as held:
        assert steps(held.folder) == [1]


@pytest.mark.slow
def test_bytes_altered_or_cut_on_the_way_down_are_fetched_again(proxy, workers, monkeypatch):
    with workers[0].hold() as held:
        save(held.folder, 1, size=200_000)
    for fault in (alter_answer, cut_body):
        proxy.strike(fault, method="GET", path="objects", times=1)
        with workers[1].hold() as held:
            assert steps(held.folder) == [1]


def spoil(s3, name, text=b"wrong bytes under a right name"):
    """Replace the objects of a stored state."""
    place = f"in flight/{NAME}"
    files = json.loads(s3.get_object(Bucket="states", Key=f"{place}/{name}")["Body"].read())
    (key,) = {one["key"] for path, one in files.items() if path.endswith("tensors.safetensors")}
    s3.put_object(Bucket="states", Key=f"{place}/{key}", Body=text)


@pytest.mark.slow
def test_wrong_bytes_under_a_right_name_are_noticed_and_the_state_before_is_taken(s3, workers):
    with workers[0].hold() as held:
        for step in (1, 2):
            save(held.folder, step)
            held.publish()
            wait_for(lambda s=step: len(head(s3).states) == s)
    newest, older = head(s3).states
    spoil(s3, newest)
    with workers[1].hold() as held:
        assert steps(held.folder) == [1] and workers[1].heard("damaged")
        save(held.folder, 2)
    assert newest not in head(s3).states
    spoil(s3, head(s3).states[0])
    spoil(s3, older)
    with pytest.raises(UserError, match="every stored checkpoint is damaged"), workers[0].hold():
        pass


def test_a_missing_object_counts_as_damage(s3, workers):
    with workers[0].hold() as held:
        save(held.folder, 1)
    (key,) = {key for key in needed(s3) if not key.endswith(head(s3).states[0])} & objects(s3) and list(needed(s3))[:1]
    s3.delete_object(Bucket="states", Key=key)
    with pytest.raises(UserError, match="every stored checkpoint is damaged"), workers[1].hold():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [-86_400, 86_400])
def test_a_store_with_another_clock_keeps_leases_all_the_same(proxy, workers, monkeypatch, seconds):
    proxy.strike(shift_clock(seconds))
    monkeypatch.setattr(s3_store, "LEASE_SECONDS", 2.0)
    with workers[0].hold() as held:
        save(held.folder, 1)
        other = Training(Bucket(URI).below(NAME), print)
        for _ in range(8):  # longer than a lease: it is renewed
            assert not other._try_acquire({"holder": "other", "who": "other"})
            time.sleep(0.4)
        with pytest.raises(LeaseLost):
            take_over(boto3.client("s3"), None)
            assert other._try_acquire({"holder": "other", "who": "other"})
            held.publish()
            wait_for(lambda: workers[0].heard("taken this training over"))
            held.publish()


@pytest.mark.slow
def test_a_full_disk_is_said_and_loses_nothing(s3, workers, monkeypatch):
    """The file system of the second worker takes half a megabyte; the state has more."""
    import resource
    import signal

    with workers[0].hold() as held:
        save(held.folder, 1, size=2**20)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"), workers[1].hold():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with workers[1].hold() as held:
        assert steps(held.folder) == [1]
