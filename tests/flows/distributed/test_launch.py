"""The launcher: which processes it starts, and what it says of how they ended; on real stages in test_worker.py."""

import json
import os
import signal
import socket
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from cm_core.parallel import ranks
from flows.distributed.launch import RESUMES, _ending, processes_for, worker_group
from flows.errors import StageFailed, UserError
from several import run_in_several
from small_stages import small_recipe


def place(folder):
    with ranks.process_group():
        return ranks.rank(), ranks.world_size(), ranks.local_rank(), ranks.all_gather(ranks.rank() * 2)


def test_processes_form_a_group_and_their_results_come_back_by_rank(tmp_path):
    assert run_in_several(place, tmp_path, 3) == {rank: (rank, 3, rank, [0, 2, 4]) for rank in range(3)}


def differing(folder):
    facts = {"seed": 7 if os.environ["RANK"] == "1" else 0}
    os.environ["LOCAL_RANK"] = "0"  # as if each were on a node of its own
    try:
        with worker_group("sample", None, lambda: facts):
            return "computed"
    except UserError as error:
        return str(error)


def test_processes_that_would_compute_something_else_refuse_in_the_same_words(tmp_path):
    first, second = run_in_several(differing, tmp_path).values()
    assert first == second and first.startswith("sample: seed is 7 on rank 1 (") and " and 0 on rank 0 (" in first


def unsuited(folder):
    try:
        with worker_group("student", small_recipe("digits-cd", "student.train.batch_size=9").student, dict):
            return "computed"
    except UserError as error:
        return str(error)


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(tmp_path, monkeypatch):
    assert set(run_in_several(unsuited, tmp_path).values()) == {"2 processes: must divide student.train.batch_size=9"}
    monkeypatch.setenv("CM_DEVICES", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="^CM_DEVICES=2: must divide student.train.batch_size=9"):
        processes_for("student", small_recipe("digits-cd", "student.train.batch_size=9").student)
    assert processes_for("student", None) == processes_for("evaluate", object()) == 1
    points = small_recipe("digits-cd", "student.method={kind: cmt, num_steps: 8}").student  # of one trajectory, a batch
    with pytest.raises(UserError, match="must divide student.train.batch_size=8 / method.num_steps=8"):
        processes_for("student", points)


def waits_for_a_late_main(folder):
    started = time.monotonic()
    if os.environ["RANK"] == "0":
        time.sleep(21)
    ranks.TIMEOUT = ranks.timedelta(seconds=20)
    with ranks.process_group():
        return time.monotonic() - started


@pytest.mark.slow
def test_others_wait_for_rank_0_longer_than_an_exchange_may_take(tmp_path):
    assert min(run_in_several(waits_for_a_late_main, tmp_path).values()) >= 20


def lose(folder):
    """Rank 0 kills rank 1 and exchanges; rank 2 waits for something else, as one does that waits for its GPU."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a training does, which ends between two steps
    ranks.GRACE = 8
    try:
        with ranks.process_group():
            pids = ranks.all_gather(os.getpid())
            if ranks.rank() == 1:
                signal.pause()
            while ranks.rank() == 2 or not (folder / "waits-2").exists():
                (folder / f"waits-{ranks.rank()}").touch()
                time.sleep(0.1)
            os.kill(pids[1], signal.SIGKILL)
            ranks.wait_for_all()
    except ranks.ProcessLost as error:
        (folder / "said").write_text(str(error))
        raise


@pytest.mark.slow
def test_survivors_name_the_lost_and_one_that_does_not_notice_ends_all_the_same(tmp_path):
    with pytest.raises(Exception, match="lose FAILED"):
        run_in_several(lose, tmp_path, 3)
    said, waits = tmp_path / "said", tmp_path / "waits-2"
    assert said.read_text() == f"lost rank 1 ({socket.gethostname()})"
    assert waits.stat().st_mtime - said.stat().st_mtime < 28, "the launcher would kill it after 30 s"


def failed(error_file, *codes):
    """Return what the launcher learns of processes that ended with these codes, in this order."""
    failures = {}
    for rank, code in codes:
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(error_file))
        failures[rank].timestamp = len(failures)
    return failures


@pytest.mark.parametrize(
    ("codes", "kind", "said"),
    [
        (((1, -9), (0, 75)), StageFailed, f"teacher: rank 1 was killed by signal 9; {RESUMES}"),
        (((0, 75), (2, 75), (1, -9)), StageFailed, f"teacher: rank 1 was killed by signal 9; {RESUMES}"),
        (((2, 3), (0, -15), (1, -9)), StageFailed, f"teacher: rank 2 ended with exit code 3; {RESUMES}"),
        (((1, 143), (0, 143)), SystemExit, "143"),
        (((1, 2), (0, 2)), SystemExit, "2"),  # rank 0 has said it
        (((1, 2), (0, 75)), UserError, "teacher.train: too large for this GPU"),
    ],
)
def test_the_first_process_that_failed_decides_how_the_stage_ends(tmp_path, codes, kind, said):
    message = {"message": "UserError: teacher.train: too large for this GPU", "extraInfo": {"timestamp": "1"}}
    (tmp_path / "error.json").write_text(json.dumps({"message": message}))
    ending = _ending("teacher", failed(tmp_path / "error.json", *codes))
    assert isinstance(ending, kind) and str(ending) == said
