"""A run's clone: what it captures, how DVC works in it, and that nothing of it is left running."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.errors import RunEnding, StageFailed, UserError
from flows.workspace import clone, dvc_files, locations, process
from flows.workspace.git import describe_code
from miniature import REPOSITORY, commit, git, make_workspace, traced
from processes import WAIT, runs, wait_until


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def fresh(tmp_path):
    return make_workspace(tmp_path / "fresh")


def test_home_is_found_from_below_and_refused_elsewhere(root, tmp_path):
    below = root / "params" / "recipes"
    below.mkdir(exist_ok=True)
    assert locations.workspace_root(below) == root
    with pytest.raises(UserError, match="not inside a workspace"):
        locations.workspace_root(tmp_path)


def test_origin_is_the_workspace_a_clone_came_from(root, monkeypatch, tmp_path):
    assert locations.shared_root(root) == root
    monkeypatch.setenv("CM_HOME", str(tmp_path))
    assert locations.shared_root(root) == tmp_path


def test_clone_captures_uncommitted_edits_as_a_commit_and_a_patch(fresh):
    (fresh / "gone.txt").write_text("tracked")
    (fresh / "moved.txt").write_text("tracked")
    git(fresh, "add", "gone.txt", "moved.txt")
    commit(fresh)
    (fresh / "gone.txt").unlink()
    (fresh / "stage.py").write_text("edited")
    (fresh / "new.bin").write_bytes(bytes(range(256)))
    (fresh / "staged.txt").write_text("staged")
    git(fresh, "add", "staged.txt")
    (fresh / "out").mkdir()
    (fresh / "out" / "ignored.txt").write_text("ignored")
    before = git(fresh, "status", "--porcelain")
    assert describe_code(fresh)["git.edits"] == "uncommitted"

    with clone.clone(fresh, "run one/ä") as copy:
        assert git(fresh, "status", "--porcelain") == before
        assert not (copy.root / "gone.txt").exists() and not (copy.root / "out").exists()
        assert (copy.root / "stage.py").read_text() == "edited"
        assert (copy.root / "new.bin").read_bytes() == bytes(range(256))
        assert (copy.root / "staged.txt").read_text() == "staged"
        assert git(copy.root, "status", "--porcelain") == ""
        assert git(copy.root, "rev-parse", "HEAD~").strip() == copy.revision == git(fresh, "rev-parse", "HEAD").strip()
        assert "new.bin" in (copy.folder / "edits.patch").read_text()


def test_clone_without_edits_of_the_code_is_at_the_origins_revision(fresh):
    (fresh / "params/active.yaml").write_text("seed: 2\n")
    dvc_files.update_lock(fresh, {"prepare": {"cmd": "x"}})
    assert "git.edits" not in describe_code(fresh)
    with clone.clone(fresh, "clean") as copy:
        assert git(copy.root, "rev-parse", "HEAD").strip() == copy.revision
        assert not copy.edits()
        assert dvc_files.read_lock(copy.root) == {"prepare": {"cmd": "x"}}


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("git@host.example:owner/name.git", "https://host.example/owner/name/commit/"),
        ("https://host.example/owner/name", "https://host.example/owner/name/commit/"),
        ("/srv/git/name.git", None),
    ],
)
def test_code_is_described_by_a_page_where_its_remote_has_one(fresh, remote, page):
    git(fresh, "remote", "add", "origin", remote)
    revision = git(fresh, "rev-parse", "HEAD").strip()
    assert describe_code(fresh).get("git.url") == (page and page + revision)


def test_clone_refuses_large_new_files_and_names_one(fresh, monkeypatch):
    monkeypatch.setattr("flows.workspace.git.MAX_UNTRACKED", 2**20)
    (fresh / "large.bin").write_bytes(bytes(2**20 + 1))
    with pytest.raises(UserError, match=r"large\.bin.*\.gitignore"):
        clone.clone(fresh, "large")


def test_clone_refuses_what_git_cannot_record(tmp_path):
    with pytest.raises(UserError, match="with a commit"):
        clone.clone(tmp_path, "run")
    root = make_workspace(tmp_path / "repository")
    with pytest.raises(UserError, match="top of its git repository"):
        clone.clone(root / "params", "run")


def test_old_runs_are_dropped_but_live_ones_never(fresh, monkeypatch):
    monkeypatch.setattr(clone, "KEPT_DONE", 1)
    monkeypatch.setattr(clone, "KEPT_FAILED", 0)
    live = clone.clone(fresh, "live")
    done = [clone.clone(fresh, f"done{index}") for index in range(3)]
    for copy in done:
        copy.__exit__(None)
        time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), clone.clone(fresh, "failed") as failed:
        raise ZeroDivisionError
    last = clone.clone(fresh, "last")
    assert [copy.folder.exists() for copy in (live, *done, failed, last)] == [True, False, False, True, False, True]


def test_what_one_door_computed_the_other_finds(root, caplog):
    """A run computes, another run and `dvc repro` find it; inputs known by their lock entry alone are fetched."""
    caplog.set_level(logging.INFO, "flows")
    entries = {}
    with clone.clone(root, "first") as first:
        for stage in dvc_files.read_stages(first.root):
            result = first.reproduce(stage)
            entries[stage] = result.entry
            assert not result.cached
            outs = dvc_files.locked_outs(result.entry)
            assert outs == {path: dvc_files.dvc_md5(first.root / path) for path in outs}
        assert "hello from teacher" in caplog.messages and not any("git add" in line for line in caplog.messages)
        clone.take_over(root, entries)
    repro = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=root, capture_output=True, text=True, check=True)
    assert repro.stdout.count("didn't change, skipping") == 4
    assert dvc_files.dvc_md5(root / "out/teacher") == dvc_files.locked_outs(entries["teacher"])["out/teacher"]

    git(root, "checkout", "--quiet", "params/active.yaml")
    (root / "dvc.lock").unlink()
    with clone.clone(root, "second") as second:
        dvc_files.update_lock(second.root, {"prepare": entries["prepare"]})
        result = second.reproduce("teacher")  # out/prepare is not in this clone, only in the cache
        assert result.cached and result.entry == entries["teacher"]


def test_key_follows_code_params_and_inputs_alone(fresh):
    stages = dvc_files.read_stages(fresh)
    known = {"out/prepare": "0" * 32}

    def key(**changed):
        return dvc_files.stage_key(fresh, stages["features"], {**known, **changed})

    first = key()
    active = (fresh / "params/active.yaml").read_text()
    (fresh / "params/active.yaml").write_text(active.replace("conditional: false", "conditional: true"))
    assert key() == first
    assert key(**{"out/prepare": "1" * 32}) != first
    (fresh / "params/active.yaml").write_text(active.replace("1.0e-05", "2.0e-05"))
    assert key() != first
    (fresh / "params/active.yaml").write_text(active)
    (fresh / "stage.py").write_text("other code")
    assert key() != first


def test_states_of_a_training_outlive_a_change_of_the_policy_for_losses_that_are_not_finite(fresh):
    """Up to such a loss both policies compute the same bits; results, unlike states, are kept apart."""
    stage, known = dvc_files.read_stages(fresh)["teacher"], {"out/prepare": "0" * 32}
    keys = {}
    for train in ("num_steps: 4", "num_steps: 5", "num_steps: 4, on_nonfinite: skip, max_nonfinite: 3"):
        (fresh / "params/active.yaml").write_text(f"seed: 1\nteacher: {{train: {{{train}}}}}\nfeatures: 1\n")
        keys[train] = [make(fresh, stage, known) for make in (dvc_files.training_key, dvc_files.stage_key)]
    (states, results), (longer, _), (skipping, skipped) = keys.values()
    assert states == skipping and states != longer and results != skipped


def test_stages_come_after_what_they_read(tmp_path):
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  last: {cmd: x, deps: [b, c], outs: [d]}\n"
        "  middle: {cmd: x, deps: [a], outs: [b, {c: {cache: true}}]}\n"
        "  first: {cmd: x, outs: [a]}\n"
    )
    assert list(dvc_files.read_stages(tmp_path)) == ["first", "middle", "last"]


def test_rewriting_the_lock_keeps_small_numbers_numbers(tmp_path):
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages:\n  a:\n    params: {x: 1e-05, y: null}\n")
    before = dvc_files.read_lock(tmp_path)
    dvc_files.update_lock(tmp_path, {"b": {"cmd": "x"}})
    assert dvc_files.read_lock(tmp_path) == {**before, "b": {"cmd": "x"}}
    assert before["a"]["params"]["x"] == 1e-05


def test_cache_holds_an_output_only_with_all_its_files(fresh):
    with clone.clone(fresh, "run") as copy:
        outs = dvc_files.locked_outs(copy.reproduce("prepare").entry)
    cache = locations.cache_of(fresh)
    assert cache.folder == fresh / ".dvc" / "cache" and cache.holds(outs)
    files = cache.files(outs["out/prepare"])
    assert files["result.txt"].read_text().startswith("prepare")
    files["result.txt"].unlink()
    assert not cache.holds(outs)
    assert not cache.holds({"out/prepare": "0" * 32 + ".dir"})


def test_independent_stages_run_side_by_side(fresh, monkeypatch, tmp_path):
    trace = tmp_path / "trace"
    monkeypatch.setenv("MINI_TRACE", str(trace))
    with clone.clone(fresh, "run") as copy:
        copy.reproduce("prepare")
        monkeypatch.setenv("MINI_AWAITS", "features teacher")
        threads = [threading.Thread(target=copy.reproduce, args=[stage]) for stage in ("features", "teacher")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {"features", "teacher"} <= set(dvc_files.read_lock(copy.root)), "neither waited for the other"


def test_a_stages_seconds_leave_out_its_wait_for_a_slot(fresh):
    @contextmanager
    def slot():
        time.sleep(2)
        yield {}

    begun = time.monotonic()
    with clone.clone(fresh, "run") as copy:
        copy.reproduce("prepare", slot=slot)
    assert 0 < copy.seconds["prepare"] < time.monotonic() - begun - 2


def test_of_runs_that_need_one_result_the_first_makes_it_for_all(fresh, monkeypatch, tmp_path, caplog):
    trace, made, ended = tmp_path / "trace", {}, []
    monkeypatch.setenv("MINI_TRACE", str(trace))
    monkeypatch.setenv("MINI_AWAITS", "leave")
    caplog.set_level(logging.INFO, logger="flows")

    def reproduce(name, copy):
        try:
            made[name] = copy.reproduce("prepare").cached
        except RunEnding:
            ended.append(name)

    with (
        clone.clone(fresh, "first") as first,
        clone.clone(fresh, "second") as second,
        clone.clone(fresh, "third") as third,
    ):
        copies = {"first": first, "second": second, "third": third}
        threads = [threading.Thread(target=reproduce, args=one) for one in copies.items()]
        threads[0].start()
        wait_until(lambda: traced(trace))
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: caplog.text.count("prepare: another run makes exactly this; waiting for it") == 2)
        third.stop()
        threads[2].join()
        assert not made and ended == ["third"], "a run that waits can be stopped"
        with trace.open("a") as file:
            file.write("leave 0 0\n")
        for thread in threads[:2]:
            thread.join()
    assert made == {"first": False, "second": True}
    assert len(traced(trace)) == 2, "prepare ran once, and one line is this test's"
    assert not any((fresh / clone.LOCKS).iterdir())


def test_a_result_that_nobody_finished_is_made_by_who_waited(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("MINI_CRASHES_ONCE", str(tmp_path / "prepare"))
    found = []

    def reproduce(copy):
        try:
            found.append(copy.reproduce("prepare").cached)
        except StageFailed:
            found.append("failed")

    with clone.clone(fresh, "first") as first, clone.clone(fresh, "second") as second:
        threads = [threading.Thread(target=reproduce, args=[copy]) for copy in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == ["failed", False]


def test_errors_of_the_user_and_crashes_are_told_apart(fresh, monkeypatch):
    with clone.clone(fresh, "run") as copy:
        monkeypatch.setenv("MINI_REFUSES", "prepare")
        with pytest.raises(UserError) as refused:
            copy.reproduce("prepare")
        assert str(refused.value) == "params/active.yaml: seed=1: must be larger"
        monkeypatch.setenv("MINI_REFUSES", "")
        monkeypatch.setenv("MINI_CRASHES", "prepare")
        with pytest.raises(StageFailed, match="ZeroDivisionError"):
            copy.reproduce("prepare")


def test_leaving_the_workspace_ends_what_runs_in_it(fresh, monkeypatch, tmp_path):
    trace = tmp_path / "trace"
    monkeypatch.setenv("MINI_TRACE", str(trace))
    monkeypatch.setenv("MINI_SECONDS", "600")
    failures = []

    def reproduce():
        with pytest.raises(RunEnding) as failure:
            copy.reproduce("prepare")
        failures.append(failure)

    with clone.clone(fresh, "run") as copy:
        thread = threading.Thread(target=reproduce)
        thread.start()
        pid = int(wait_until(lambda: traced(trace))[0][2])
    thread.join()
    assert failures and not runs(pid)
    with pytest.raises(RunEnding):
        copy.reproduce("prepare")


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_process_that_saves_its_state_is_asked_to_stop_once(monkeypatch, tmp_path):
    """As `Workspace.stop` does with several; a training that gets a second SIGTERM ends without its state."""
    monkeypatch.setenv("CM_GRACE", "300")
    code = (
        "import os, signal, time\n"
        "def say(text): os.write(1, text.encode() + b'\\n')\n"
        "def stop(*_):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: say('asked again'))\n"
        "    say('saving'); time.sleep(1); say('saved'); raise SystemExit(143)\n"
        "signal.signal(signal.SIGTERM, stop); say('ready'); time.sleep(600)"
    )
    running = process.Process([sys.executable, "-c", code], cwd=tmp_path, env={})
    said = running.lines()
    assert next(said) == "ready"
    running.terminate()
    assert next(said) == "saving"
    assert running.end() == 143
    assert list(said) == ["saved"]


def test_a_process_deaf_to_sigterm_is_killed_after_the_grace(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "GRACE", 0.3)
    running = process.Process([sys.executable, "-c", STUBBORN], cwd=tmp_path, env={})
    pid = int(next(running.lines()))
    started = time.monotonic()
    assert running.end() == -9
    assert time.monotonic() - started >= 0.3 and not runs(pid)


def test_a_process_left_behind_by_its_parent_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "GRACE", 0.3)
    left = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}])"
    running = process.Process([sys.executable, "-c", left], cwd=tmp_path, env={})
    pid = int(next(iter(running.lines())))
    assert running.end() == 0
    wait_until(lambda: not runs(pid))


def test_a_process_whose_starter_is_killed_ends_after_the_grace(tmp_path):
    """As a flow is that does not end in time when it is cancelled, in the middle of a transfer of DVC."""
    code = (
        "import sys; from pathlib import Path; from flows.workspace import process\n"
        "process.LEAVE = 0.0\n"
        "running = process.Process([sys.executable, '-c', sys.argv[1]], cwd=Path.cwd(), env={})\n"
        "for line in running.lines(): print(line, flush=True)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CM_GRACE": "1"}
    starter = subprocess.Popen(
        [sys.executable, "-c", code, STUBBORN], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    )
    with starter:
        pid = int(starter.stdout.readline())
        assert runs(pid)
        starter.kill()
    wait_until(lambda: not runs(pid))


def test_ticks_come_while_the_command_is_silent(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "TICK", 0.05)
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 4:
            running.terminate()

    running = process.Process(["sleep", "600"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert list(running.lines(on_tick=tick)) == [] and running.end() == -signal.SIGTERM


def test_progress_is_passed_on_when_it_changes(tmp_path):
    seen = []
    progress = clone._Progress(Path(tmp_path / "progress.json"), seen.append)
    progress.look()
    progress.path.write_text('{"done": 1}')
    progress.look()
    progress.look()
    assert seen == [{"done": 1}]


def test_a_run_of_many_overrides_has_a_folder_all_the_same(tmp_path):
    folder = clone._make_folder(tmp_path, "cifar10-cd " + "data.source.path=/a/b/c " * 40)
    assert folder.is_dir() and len(folder.name) < 80


LISTENER = """
import sys, time
from pathlib import Path
from flows.stage_runner.signals import StageSignals, end_with_caller

with StageSignals(deferred=True) as signals:
    end_with_caller(signals.received)
    print("begun", flush=True)
    while not signals.received():
        time.sleep(0.02)
    print("nobody may read this", flush=True)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1]).write_text("saved")
"""


def test_a_stage_whose_flow_is_gone_saves_and_ends(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LISTENER, str(tmp_path / "state"), "0"]
    stage = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert stage.stdout.readline() == b"begun\n"
    stage.stdout.close()
    stage.stdin.close()
    assert stage.wait(WAIT) == 0 and (tmp_path / "state").read_text() == "saved"


@pytest.mark.parametrize(("saving", "grace", "code"), [(1, 300, 0), (600, 1, 128 + signal.SIGTERM)])
def test_a_flow_that_ends_while_its_stage_saves_waits_its_grace_for_it(tmp_path, saving, grace, code):
    """The flow's end is no second request to stop, which would end the stage at once."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CM_GRACE": str(grace)}
    command = [sys.executable, "-c", LISTENER, str(tmp_path / "state"), str(saving)]
    stage = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert stage.stdout.readline() == b"begun\n"
    stage.terminate()
    assert stage.stdout.readline() == b"nobody may read this\n"
    stage.stdin.close()
    assert stage.wait(WAIT) == code and (tmp_path / "state").exists() == (code == 0)
    stage.stdout.close()


COLLIDER = """
import io, os, signal, sys
from pathlib import Path
from flows.stage_runner.progress import Bar, StageMonitor
from flows.stage_runner.signals import StageSignals

class SignallingStream(io.RawIOBase):
    sent = False

    def writable(self):
        return True

    def write(self, data):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)  # its handler runs here, where the buffer above is in use
        return os.write(1, data)

sys.stdout = io.TextIOWrapper(io.BufferedWriter(SignallingStream()))
with StageSignals(deferred=True) as signals:
    monitor = StageMonitor(Bar("teacher", lines=True), None, signals.received)
    monitor.progress(1, 1, "steps")
    assert monitor.stop_requested()
    assert monitor.stop_requested()
    Path(sys.argv[1]).write_text("saved")
"""


def test_a_signal_in_the_middle_of_a_print_stops_the_stage_with_its_state_saved(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", COLLIDER, str(tmp_path / "state")]
    stage = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert stage.returncode == 0, stage.stderr
    assert (tmp_path / "state").read_text() == "saved"
    progress, announcement = stage.stdout.splitlines()
    assert progress == "teacher: 1 of 1 steps"
    assert announcement.startswith("teacher: stopping") and "training state" in announcement
