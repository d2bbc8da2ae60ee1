"""A stored result that names its own reader, planted as by whoever can write to the store, runs nothing."""

import base64
import json
import pickle
import time
from pathlib import Path

import pytest
from prefect import task
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultRecord, ResultStore

from cm_core.methods.ct import CT
from flows.orchestration.results import read_json_alone
from flows.recipes.recipe import Recipe
from flows.stages.student import Student
from miniature import make_workspace


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def pickled(trace: Path) -> str:
    return base64.encodebytes(pickle.dumps(Bomb(trace))).decode()


def records(trace: Path) -> dict[str, dict]:
    """Return records that run code when Prefect reads them as they ask to be read."""
    command = json.dumps({"touch": 0, str(trace): 1})
    return {
        "pickle": {"metadata": {"serializer": {"type": "pickle"}}, "result": pickled(trace)},
        "default": {"metadata": {}, "result": pickled(trace)},
        "old format": {"serializer": {"type": "pickle"}, "data": pickled(trace), "metadata": {}},
        "callable": {
            "metadata": {"serializer": {"type": "json", "object_decoder": "subprocess.Popen"}},
            "result": command,
        },
    }


@pytest.fixture
def as_prefect_reads(monkeypatch):
    """Prefect's own way to read, until the test changes it; restored afterwards."""
    monkeypatch.setattr(ResultRecord, "deserialize", ResultRecord.deserialize)


@pytest.fixture
def place(as_prefect_reads, tmp_path):
    """A store in which records can be planted, read as the flow reads it."""
    read_json_alone()
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


@pytest.mark.parametrize("kind", records(Path()))
def test_a_planted_record_runs_nothing(place, kind):
    trace = place.parent / "owned"
    (place / "key").write_text(json.dumps(records(trace)[kind]))
    store = ResultStore(result_storage=LocalFileSystem(basepath=str(place)))
    if store.exists("key"):
        assert store.read("key").result == {"touch": 0, str(trace): 1}, "data, nothing else"
    time.sleep(0.3)
    assert not trace.exists()


def test_what_the_flow_stores_it_finds_again(place):
    store = ResultStore(result_storage=LocalFileSystem(basepath=str(place)))
    store = store.update_for_task(task(lambda: None, result_serializer="json", persist_result=True))
    entry = {"outs": [{"path": "out/teacher", "md5": "0"}], "__class__": "an ordinary key"}
    store.write(entry, key="key")
    fresh = ResultStore(result_storage=LocalFileSystem(basepath=str(place)))
    assert fresh.exists("key") and fresh.read("key").result == entry


@pytest.mark.slow
def test_a_run_computes_what_a_planted_record_pretends_to_have(as_prefect_reads, tmp_path, monkeypatch):
    """The whole flow on a workspace whose stored results were all replaced."""
    from flows import pipeline

    for name in ("CM_HOME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    root, recipe = make_workspace(tmp_path / "mini"), Recipe(seed=1, student=Student(method=CT()))
    pipeline.run(recipe, root, keep=False)
    trace, stored = tmp_path / "owned", list((root / ".cm" / "prefect" / "storage").glob("*-*"))
    assert len(stored) >= 4
    for path in stored:
        path.write_text(json.dumps(records(trace)["pickle"]))
    again = pipeline.run(recipe, root, keep=False)
    assert all(result["cached"] for result in again["stages"].values()), "DVC has them, who was asked"
    assert not trace.exists()
