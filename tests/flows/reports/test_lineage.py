"""The lineage of a model: whole, with few lines, and well-formed whatever its names are."""

import xml.etree.ElementTree as ET

import pytest

from flows.reports.lineage import code_of, lineage, mermaid, svg
from flows.workspace.dvc_files import read_stages, upstream
from miniature import REPOSITORY

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def nodes():
    stages = read_stages(REPOSITORY)
    before = {name: [one.name for one in upstream(stage, stages)] for name, stage in stages.items()}
    sources = {"data": "digits", "code": "120883c", "recipe": 'a "<&#> ] recipe with quite a long name'}
    versions = {name: f"{number}" * 32 for number, name in enumerate(stages) if name != "edit"}
    return lineage(sources, before, versions, model="cm-digits", stale={"code", "student", "evaluate"})


def test_what_a_model_is_made_of_comes_before_it(nodes):
    made = {node.name: node for node in nodes}
    for place, node in enumerate(nodes):
        assert {one.name for one in nodes[:place]} >= set(node.after)
    assert made["prepare"].after == ("data", "code", "recipe")
    assert made["student"].after == ("base",) and made["base"].after == ("teacher",), "which has read what prepare made"
    assert set(made["evaluate"].after) == {"features", "sample", "edit"}
    assert made["edit"].version == "not made yet" and made["prepare"].version == "00000000"
    assert {node.name for node in nodes if node.stale} == {"code", "student", "evaluate", "model"}


def test_a_base_that_the_recipe_has_not_is_no_part_of_it():
    stages = {"prepare": [], "teacher": ["prepare"], "base": ["prepare", "teacher"], "student": ["teacher", "base"]}
    made = {one.name: one.after for one in lineage({"data": "digits"}, stages, {}, model="cm-digits", has_base=False)}
    assert "base" not in made and made["student"] == ("teacher",)


def test_its_picture_has_a_box_a_node_and_a_line_an_edge(nodes):
    root = ET.fromstring(svg(nodes))
    assert len(root.findall(f"{SVG}rect")) == 1 + len(nodes)
    assert len(root.findall(f"{SVG}path")) == sum(len(node.after) for node in nodes)
    assert len([box for box in root.findall(f"{SVG}rect") if "stroke-dasharray" in box.attrib]) == 4
    said = [text.text for text in root.findall(f"{SVG}text")]
    assert 'a "<&#> ] recipe with…' in said and {"student", "cm-digits"} <= set(said)
    boxes = {(float(box.get("x")), float(box.get("y"))) for box in root.findall(f"{SVG}rect")[1:]}
    assert len(boxes) == len(nodes), "none hides another"


def test_its_flowchart_quotes_what_mermaid_would_read(nodes):
    lines = mermaid(nodes).splitlines()
    assert lines[0] == "flowchart LR" and lines[-1] == "  class n1,n7,n10,n11 stale"
    assert '  n2["recipe<br>a #quot;#lt;&#35;> ] recipe with quite a long name"]' in lines


def test_edited_code_is_called_so():
    assert code_of({"git.revision": "120883c" * 5, "git.edits": "uncommitted"}) == "120883c1 + edits"
    assert code_of({}) == "unknown"
