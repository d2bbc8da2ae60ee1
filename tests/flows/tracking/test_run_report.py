"""Whom a run is compared with in its report, and what the report says of the run."""

import json
import re
from types import SimpleNamespace

import pytest

from flows.recipes.recipe import load_recipe
from flows.reports.run_facts import LINEAGE, RUN
from flows.tracking import run_report
from flows.tracking.registry import Registered, Version, protocol_digest
from flows.tracking.run_report import earlier_students, keep_report
from flows.workspace.dvc_files import version
from miniature import REPOSITORY

PROTOCOL = {
    "reference": {},
    "network": {},
    "samples": {},
    "torch_fidelity": "0.4.0",
    "settings": {},
    "rows": {"nfe_1": {"model": "student", "num_images": 9}},
}
METRICS = {"fid_classifier": {"nfe_1": 2.5, "real": 0.1}}
OUTS = {"prepare": {"out/prepare": "a"}, "student": {"out/student": "b"}}


@pytest.fixture
def files(tmp_path):
    contents = {
        "prepare/dataset.json": json.dumps({"name": "digits"}),
        "evaluate/protocol.json": json.dumps(PROTOCOL),
        "evaluate/metrics.json": json.dumps(METRICS),
        "evaluate/report.html": f"<main>{RUN}<!-- comparison -->{LINEAGE}</main>",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in contents}


def registered(number, model, *, protocol=None):
    tags = {"recipe": f"recipe-{number}", "run_id": f"{number}" * 32}
    digest = protocol_digest(PROTOCOL) if protocol is None else protocol
    return Version(number, version(OUTS["prepare"]), digest, {"fid_classifier/nfe_1": float(number)}, model, tags)


def compared(monkeypatch, files, *versions, champion=None, own=None, known=True):
    aliases = {"champion": champion} if champion else {}
    found = Registered("cm-digits", {one.number: one for one in versions}, aliases)
    registry = SimpleNamespace(names=lambda: ["cm-digits"] if known else [], read=lambda name: found)
    monkeypatch.setattr(run_report, "Registry", lambda tracker: registry)
    return earlier_students(SimpleNamespace(find_student=lambda _: own), OUTS, files)


def test_the_champion_and_the_newest_other_student_measured_alike(monkeypatch, files):
    versions = [registered(1, "x"), registered(2, "y"), registered(3, "z"), registered(4, "w", protocol="another")]
    champion, previous = compared(monkeypatch, files, *versions, champion=1)
    assert (champion.title, previous.title) == ("champion", "previous")
    assert champion.note == "version 1, recipe recipe-1, run 11111111"
    assert previous.numbers == {"fid_classifier/nfe_1": 3.0}


def test_a_student_is_not_compared_with_itself_as_the_previous_one(monkeypatch, files):
    versions = [registered(1, "x"), registered(2, "y")]
    (previous,) = compared(monkeypatch, files, *versions, own="y")
    assert previous.note.startswith("version 1,")
    (champion, previous) = compared(monkeypatch, files, *versions, champion=2, own="y")
    assert champion.note.startswith("this very student, version 2") and previous.note.startswith("version 1,")
    (champion,) = compared(monkeypatch, files, *versions, champion=2)
    assert champion.title == "champion", "the newest is the champion: once is enough"


def test_nobody_to_compare_with(monkeypatch, files):
    assert compared(monkeypatch, files, known=False) == []
    assert compared(monkeypatch, files, registered(1, "x", protocol="another"), champion=1) == []


def kept(tmp_path, files, run_id, recipe, name="digits-cd"):
    info = SimpleNamespace(start_time=0)
    tracker = SimpleNamespace(
        client=SimpleNamespace(get_run=lambda _: SimpleNamespace(info=info)), book_usage=lambda _: {}
    )
    tags = {"recipe": name, "git.revision": "c" * 40}
    parent = SimpleNamespace(tracker=tracker, tags=tags, run_id=run_id, name="digits-cd · cd")
    stages = {"prepare": {"cached": True}, "student": {"cached": False}}
    return keep_report(parent, recipe, REPOSITORY, tmp_path / "workspace", files, stages, {}, [], "<svg></svg>")


def test_reports_of_one_title_lie_beside_each_other_and_say_how_to_repeat_the_run(tmp_path, files):
    recipe = load_recipe("digits-cd", ["student.method.solver=euler"], root=REPOSITORY)
    name = "digits-cd student.method.solver=euler"
    first, second = (kept(tmp_path, files, letter * 32, recipe, name) for letter in "ab")
    assert first.parent == second.parent == tmp_path / "workspace" / ".cm" / "reports"
    assert [path.name for path in (first, second)] == ["digits-cd-cd-aaaaaaaa.html", "digits-cd-cd-bbbbbbbb.html"]
    page = first.read_text()
    assert re.search(
        r"git checkout cccccccccccc\ncm run digits-cd \\\n    --set student\.method\.solver=euler</pre>", page
    )
    assert "<svg></svg>" in page, "the lineage"
    assert "<dt>Computed</dt><dd>student</dd>" in page and "<dt>Run</dt><dd>aaaaaaaa</dd>" in page


def test_without_a_report_of_the_stage_there_is_none_of_the_run(tmp_path, files):
    recipe = load_recipe("digits-cd", root=REPOSITORY)
    without = {name: path for name, path in files.items() if not name.endswith(".html")}
    assert kept(tmp_path, without, "a" * 32, recipe) is None
