"""`cm run` beside its results: messages about its end, log lines for machines."""

import json
import logging
import os
import subprocess
import sys

import pytest

from flows.errors import UserError
from flows.json_log import JsonFormatter, json_wanted
from flows.notification import send, told_of_failure
from flows.stage_runner.progress import Bar
from miniature import REPOSITORY, make_workspace
from servers import webhook


@pytest.mark.slow
def test_a_run_logs_json_and_tells_how_it_ended(tmp_path):
    root = make_workspace(tmp_path)
    (root / "params" / "recipes").mkdir()
    (root / "params" / "recipes" / "tiny.yaml").write_text("seed: 4\n")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CM_LOG": "json"}
    command = [sys.executable, "-m", "flows.cli", "run", "tiny"]
    with webhook() as (address, told):
        env["CM_NOTIFY"] = address
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        hello = [line for line in lines if line["message"] == "hello from teacher"]
        assert [line["stage"] for line in hello] == ["teacher"] and hello[0]["level"] == "INFO"
        assert len({line["run"] for line in lines}) == 1
        assert [(one["title"], one["type"]) for one in told] == [("tiny \u00b7 cd heun N=18 finished", "success")]
        assert "nfe_1: FID 2.5" in told[0]["message"]

        failing = [*command, "--set", "seed=5"]
        failed = subprocess.run(
            failing, cwd=root, env={**env, "MINI_REFUSES": "teacher"}, capture_output=True, check=False
        )
        assert failed.returncode == 2
        assert (told[1]["title"], told[1]["type"]) == ("tiny seed=5 failed", "failure")
        assert told[1]["message"] == "params/active.yaml: seed=1: must be larger"


def test_who_stops_a_run_is_told_so():
    with webhook() as (address, told):
        with pytest.raises(KeyboardInterrupt), told_of_failure(address, "tiny"):
            raise KeyboardInterrupt
        with told_of_failure(None, "tiny"):
            pass
    assert [one["title"] for one in told] == ["tiny was stopped"]


def test_an_address_that_cannot_be_told_is_refused_before_anything_runs(caplog):
    with pytest.raises(UserError, match="nothing://...: no address that apprise knows"):
        with told_of_failure("nothing://secret", "tiny"):
            pytest.fail("it ran")
    send("json://127.0.0.1:1/", "tiny finished", "", failed=False)
    assert "notification: not delivered: tiny finished" in caplog.text


def test_log_lines_name_what_is_known(monkeypatch, capsys, tmp_path):
    formatter = JsonFormatter(lambda: {"stage": "teacher", "run": None})
    try:
        raise ValueError("odd")
    except ValueError:
        record = logging.LogRecord("flows.x", logging.ERROR, "", 1, "no %s", ("luck",), sys.exc_info())
    line = json.loads(formatter.format(record))
    assert (line["message"], line["stage"], line["level"], line["logger"]) == ("no luck", "teacher", "ERROR", "flows.x")
    assert "ValueError: odd" in line["error"] and "run" not in line and line["time"].endswith("+00:00")

    monkeypatch.setenv("CM_LOG", "json")
    Bar("student", lines=True).remark("resumes")
    assert json.loads(capsys.readouterr().out)["stage"] == "student"
    monkeypatch.setenv("CM_PROGRESS_FILE", str(tmp_path / "progress"))
    assert not json_wanted(), "its flow logs what it says"
    monkeypatch.setenv("CM_LOG", "xml")
    with pytest.raises(UserError, match="CM_LOG=xml: must be text or json"):
        json_wanted()
