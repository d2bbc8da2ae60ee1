"""Machines that share a stage meet, or say in one line why not; each notices when another goes."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from flows.distributed import rendezvous
from flows.distributed.devices import devices_for, nodes_for
from flows.distributed.launch import several_processes
from flows.errors import StageFailed, UserError
from flows.monitor import Monitor
from servers import free_port

FACTS = {"out/prepare": "abc.dir", "student.train.batch_size": 8}


class Told(Monitor):
    def __init__(self):
        self.remarks = []

    def remark(self, text):
        self.remarks.append(text)


@pytest.fixture(autouse=True)
def place(monkeypatch):
    """An address to meet at, and impatient nodes."""
    for variable in rendezvous.INTERFACES:
        monkeypatch.setenv(variable, "lo")
    for name, seconds in (("WAIT", 5.0), ("BEAT", 0.05), ("SILENCE", 0.5)):
        monkeypatch.setattr(rendezvous, name, seconds)
    address = ("127.0.0.1", free_port())
    monkeypatch.setenv("CM_MEET", "{}:{}".format(*address))
    return address


def result_of(function, *arguments):
    try:
        return function(*arguments)
    except (UserError, rendezvous.NodeMissing) as error:
        return error


def meet(count, *facts, stage="student"):
    """Let a main node and others with these facts meet; return what came of it at each."""
    with ThreadPoolExecutor() as pool:
        main = pool.submit(result_of, rendezvous.meet, stage, count, FACTS, Told())
        others = [pool.submit(result_of, rendezvous.enter, stage, theirs, str) for theirs in facts]
        links = main.result()
        if isinstance(links, list):
            rendezvous.welcome(links, 1234)
        return links, [other.result() for other in others]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_get_a_place_of_their_own():
    links, entered = meet(3, FACTS, FACTS)
    assert {welcome for _, welcome in entered} == {rendezvous.Welcome(1, 3, 1234), rendezvous.Welcome(2, 3, 1234)}
    assert len(links) == 2


def test_nodes_that_would_compute_something_else_are_refused_everywhere_in_the_same_line():
    refused, (said,) = meet(2, FACTS | {"student.train.batch_size": 16})
    assert isinstance(refused, UserError) and isinstance(said, UserError)
    assert (
        str(refused)
        == str(said)
        == (
            f"student: student.train.batch_size is 16 on node 1 ({socket.gethostname()}) and 8 on the main node; "
            "all must compute the same"
        )
    )


def test_a_node_that_lacks_an_input_is_refused_and_all_others_hear_of_it():
    refused, said = meet(3, FACTS, {"student.train.batch_size": 8})
    assert "out/prepare is missing on node" in str(refused)
    wanted = [error for error in said if isinstance(error, UserError)]
    assert wanted and {str(error) for error in wanted} == {str(refused)}


def test_a_node_that_never_comes_is_missed_after_the_wait_that_was_announced(monkeypatch, place):
    monkeypatch.setattr(rendezvous, "WAIT", 0.3)
    told = Told()
    missed = result_of(rendezvous.meet, "student", 3, FACTS, told)
    assert told.remarks == ["waits at {}:{} for the 2 other nodes, at most 0 s".format(*place)]
    assert str(missed) == "student: 1 of CM_NODES=3 nodes were there after 0 s; start the others"


def test_the_stage_fails_in_that_line(monkeypatch, tmp_path):
    monkeypatch.setattr(rendezvous, "WAIT", 0.2)
    monkeypatch.setenv("CM_NODES", "2")
    with pytest.raises(StageFailed, match="^sample: 1 of CM_NODES=2 nodes were there"):
        with several_processes("sample", object(), tmp_path):
            pass


def test_whoever_waits_with_it_hears_that_another_never_came(monkeypatch):
    monkeypatch.setattr(rendezvous, "WAIT", 0.5)
    missed, (said,) = meet(3, FACTS)
    assert str(missed) == str(said) == "student: 2 of CM_NODES=3 nodes were there after 0 s; start the others"


def test_a_main_node_that_never_comes_is_missed(monkeypatch, place):
    monkeypatch.setattr(rendezvous, "WAIT", 0.2)
    missed = result_of(rendezvous.enter, "student", FACTS, str)
    assert str(missed) == "student: no main node waited for one at {}:{} within 0 s".format(*place)


def test_a_stop_ends_the_wait():
    class Stopping(Monitor):
        def stop_requested(self):
            return True

    assert "stopped" in str(result_of(rendezvous.meet, "student", 2, FACTS, Stopping()))


def test_a_node_for_a_later_stage_asks_again_and_strangers_do_not_disturb(place):
    with ThreadPoolExecutor() as pool:
        early = pool.submit(result_of, rendezvous.enter, "student", FACTS, str)
        main = pool.submit(result_of, rendezvous.meet, "teacher", 2, FACTS, Told())
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"7\n", b'{"stage": "teacher"}\n', b""):
            wait_until(lambda words=words: _says(place, words))
        right = pool.submit(result_of, rendezvous.enter, "teacher", FACTS, str)
        rendezvous.welcome(main.result(), 1)
        assert right.result()[1] == rendezvous.Welcome(1, 2, 1) and not early.done()
        rendezvous.welcome(rendezvous.meet("student", 2, FACTS, Told()), 2)
        assert early.result()[1] == rendezvous.Welcome(1, 2, 2)


def _says(place, words):
    with suppress(ConnectionError):
        with socket.create_connection(place) as connection:
            connection.sendall(words)
            return True
    return False


def linked():
    """Return both ends of a connection, kept."""
    (link,), ((other, _),) = meet(2, FACTS)
    other.keep()
    return link, other


def test_signs_of_life_keep_a_connection_and_its_end_is_told():
    link, other = linked()
    time.sleep(1.2)  # longer than the silence that is taken for a loss
    assert not link.ended() and not other.ended()
    link.part()
    wait_until(other.ended)
    assert other.lost is None
    other.part("process 3 was killed")
    wait_until(link.ended)


def test_what_went_wrong_is_told():
    link, other = linked()
    other.part("process 3 was killed by signal 9")
    wait_until(lambda: link.lost)
    assert link.lost == "process 3 was killed by signal 9"


def test_a_node_that_goes_without_a_word_is_lost(place):
    link, other = linked()
    link.close()
    wait_until(lambda: other.lost)
    assert other.lost == "the main node ({}:{}) is gone".format(*place)


def test_a_silent_node_is_lost(monkeypatch):
    monkeypatch.setattr(rendezvous.Link, "_beat", lambda self: threading.Event().wait(2))
    link, _ = linked()
    wait_until(lambda: link.lost)
    assert link.lost == f"node 1 ({socket.gethostname()}) gave no sign of life for 0 s"


@pytest.mark.parametrize("value", ["", "here", "host:", ":29500", "host:x", "host:0", "host:70000"])
def test_a_meeting_place_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("CM_MEET", value)
    with pytest.raises(UserError, match=f"^CM_MEET={value}: must be host:port"):
        rendezvous.meeting_place()


def test_a_meeting_place_of_another_machine_is_refused(monkeypatch):
    monkeypatch.setenv("CM_MEET", "192.0.2.1:29500")
    with pytest.raises(UserError, match=r"^CM_MEET=192\.0\.2\.1:29500: this machine cannot listen there"):
        rendezvous.meet("student", 2, FACTS, Told())


def test_numbers_of_nodes(monkeypatch):
    assert nodes_for("teacher") == 1
    monkeypatch.setenv("CM_NODES", "3")
    assert nodes_for("teacher") == 3 and nodes_for("evaluate") == 1
    monkeypatch.setenv("CM_DEVICES", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices_for("teacher", batch_size=12, nodes=3) == 2
    with pytest.raises(UserError, match="CM_DEVICES=2 times CM_NODES=3: must divide teacher.train.batch_size=8"):
        devices_for("teacher", batch_size=8, nodes=3)
    monkeypatch.setenv("CM_NODES", "0")
    with pytest.raises(UserError, match="CM_NODES=0: must be a number of machines, 1 or more"):
        nodes_for("teacher")
