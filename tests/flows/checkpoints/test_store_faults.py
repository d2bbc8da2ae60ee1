"""Checkpoints on the bad days of a store: nothing is lost, and what cannot be done is said."""

import json
import threading

import boto3
import pytest

from fault_proxy import (
    alter_answer,
    alter_request,
    cut_answer,
    cut_body,
    cut_request,
    error,
    ignore,
    shift_clock,
    slow,
)
from flows.checkpoints import s3_store
from flows.checkpoints.s3_store import LeaseLost, Training
from flows.commands import doctor
from flows.errors import UserError
from flows.storage.bucket import Bucket
from processes import wait_until
from s3_states import NAME, URI, head, needed, objects, save, steps, take_over

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
        wait_until(lambda: head(boto3.client("s3")).states)
        proxy.strike(fault, method="PUT")
        save(held.folder, 2)
        held.publish()
        wait_until(lambda: first.heard("training continues"))
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
    worker, all_wait = workers[0], threading.Event()

    def fail_when_all_wait(exchange):
        all_wait.wait()
        error(500, "InternalError")(exchange)

    with worker.hold() as held:
        proxy.strike(fail_when_all_wait, method="PUT")
        for step in (1, 2, 3):
            save(held.folder, step)
            held.publish()
        all_wait.set()
        wait_until(lambda: worker.heard("training continues"))
        proxy.heal()
        wait_until(lambda: worker.heard("works again"))
        assert len(head(boto3.client("s3")).states) == 1, "of the waiting states only the newest was sent"
    with workers[1].hold() as held:
        assert steps(held.folder) == [3]


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, float("inf")])
def test_requests_that_meet_at_the_store_cost_no_lease(proxy, workers, monkeypatch, times):
    """S3 answers 409 where two conditional requests meet, whoever of them is right."""
    monkeypatch.setattr("flows.storage.bucket.CONFLICT_PAUSES", (0.01, 0.01, 0.01))
    worker = workers[0]
    with worker.hold() as held:
        proxy.strike(error(409, "ConditionalRequestConflict"), method="PUT", path="head.json", times=times)
        save(held.folder, 1)
        held.publish()
        if times > 2:
            wait_until(lambda: worker.heard("training continues"))
            proxy.heal()
        wait_until(lambda: len(head(boto3.client("s3")).states) == 1)
        save(held.folder, 2)
        held.publish()
    assert not worker.heard("taken") and len(head(boto3.client("s3")).states) == 2


@pytest.mark.parametrize(
    ("method", "header", "says"),
    [
        ("PUT", "If-None-Match", "ignores If-None-Match, two workers could train the same"),
        ("PUT", "If-Match", "ignores If-Match, a late worker could overwrite another"),
        ("DELETE", "If-Match", "ignores If-Match of DELETE, a late worker could delete"),
    ],
)
def test_the_doctor_refuses_a_store_that_ignores_conditions(proxy, s3, method, header, says):
    assert "a second writer and a late one were refused" in doctor._prove_leases(Bucket(URI))
    proxy.strike(ignore(header), method=method)
    with pytest.raises(doctor.Broken, match=says):
        doctor._prove_leases(Bucket(URI))
    assert s3.list_objects_v2(Bucket="states")["KeyCount"] == 0, "nothing is left behind"


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
        wait_until(lambda: head(boto3.client("s3")).states)
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
            wait_until(lambda s=step: len(head(s3).states) == s)
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
    monkeypatch.setattr(s3_store, "RENEWALS", 10 * s3_store.LEASE_SECONDS)
    with workers[0].hold() as held:
        save(held.folder, 1)
        other, written = Training(Bucket(URI).below(NAME), print), set()
        while len(written) < 4:  # it is renewed
            assert not other._try_acquire({"holder": "other", "who": "other"})
            written.add(head(boto3.client("s3")).write)
        with pytest.raises(LeaseLost):
            take_over(boto3.client("s3"), None)
            assert other._try_acquire({"holder": "other", "who": "other"})
            held.publish()
            wait_until(lambda: workers[0].heard("taken this training over"))
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
