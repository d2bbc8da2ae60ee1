"""dvc.yaml says of each stage what its source says: command, inputs, code, params."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.errors import UserError
from flows.recipes.recipe import Recipe
from flows.workspace import declare, import_closure
from flows.workspace.dvc_files import PARAMS_FILE, dvc_md5, files_in, load_yaml, read_lock, read_stages, stage_key
from miniature import make_workspace

ROOT = Path(__file__).parents[3]
STAGES = ["prepare", "features", "teacher", "base", "student", "sample", "edit", "evaluate"]


@pytest.fixture(scope="module")
def declared():
    return load_yaml(ROOT / "dvc.yaml")["stages"]


def test_the_stages_are_those_of_the_pipeline(declared):
    assert sorted(declared) == sorted(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_yaml_declares_what_the_source_says(stage, declared):
    said = {key: declared[stage].get(key) for key in ("cmd", "deps", "params")}
    assert said == declare.declare(ROOT, stage), "bring dvc.yaml up to date: python -m flows.workspace.declare"


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_sections_of_the_recipe(stage, declared):
    sections = [section for file in declared[stage]["params"] for section in file[PARAMS_FILE]]
    assert sections and set(sections) <= set(Recipe.model_fields)


def test_outputs_lie_in_the_stages_own_folder_and_do_not_overlap():
    outs = [(stage.name, Path(out)) for stage in read_stages(ROOT).values() for out in stage.outs]
    for stage, out in outs:
        assert out.parts[:2] == ("out", stage)
        assert not any(other != out and other in (out, *out.parents) for _, other in outs)


def test_inputs_are_outputs_of_other_stages():
    stages = read_stages(ROOT).values()
    outs = {out for stage in stages for out in stage.outs}
    assert {dep for stage in stages for dep in stage.deps if dep.startswith("out/")} <= outs


@pytest.mark.parametrize("stage", ["prepare", "student"])
def test_the_closure_holds_all_that_importing_the_stage_runs(stage):
    code = f"import sys, flows.stages.{stage}; print(*(getattr(m, '__file__', '') for m in sys.modules.values()))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    ran = {
        Path(file).relative_to(ROOT).as_posix()
        for package in import_closure.PACKAGES
        for file in run.stdout.split()
        if Path(file).is_relative_to(ROOT / package)
    }
    assert f"flows/stages/{stage}.py" in ran
    assert ran <= set(import_closure.import_closure(ROOT, f"flows.stages.{stage}"))


def write_tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


TREE = {
    "flows/__init__.py": "",
    "flows/stages/__init__.py": "",
    "flows/stages/x.py": """
from typing import TYPE_CHECKING
import numpy
if TYPE_CHECKING:
    from cm_core import only_for_types
else:
    from cm_core import otherwise
def x(seed, data, a_dir, *, out_dir, state_dir, monitor):
    from cm_core.inside import f
""",
    "cm_core/__init__.py": "from cm_core import of_the_package",
    "cm_core/of_the_package.py": "",
    "cm_core/only_for_types.py": "",
    "cm_core/otherwise.py": "import cm_core.deep.er",
    "cm_core/inside.py": "from . import beside\nfrom .deep import something",
    "cm_core/beside.py": "import cm_core.inside",
    "cm_core/deep/__init__.py": "",
    "cm_core/deep/er.py": "from .. import up",
    "cm_core/up.py": "PAGE = 'templates/page.html'",
    "cm_core/templates/page.html": "",
    "cm_core/templates/of_another_page.html": "",
    "cm_core/nobody_imports_it.py": "",
}


def test_closure_follows_every_import_that_may_run_and_has_the_templates(tmp_path):
    write_tree(tmp_path, TREE)
    unused = ("only_for_types.py", "nobody_imports_it.py", "templates/of_another_page.html")
    expected = set(TREE) - {f"cm_core/{name}" for name in unused}
    assert import_closure.import_closure(tmp_path, "flows.stages.x") == sorted(expected)


def test_declarations_are_rewritten_and_all_else_is_kept(tmp_path):
    write_tree(tmp_path, TREE)
    (tmp_path / "dvc.yaml").write_text("# a remark\nstages:\n  x:\n    cmd: old\n    outs:\n    - out/x\n")
    assert declare.write_declarations(tmp_path)
    text = (tmp_path / "dvc.yaml").read_text()
    entry = load_yaml(tmp_path / "dvc.yaml")["stages"]["x"]
    assert text.startswith("# a remark") and entry["outs"] == ["out/x"] and entry["cmd"] == "cm stage x"
    assert entry["params"] == [{PARAMS_FILE: ["seed", "data"]}]
    assert entry["deps"][0] == "out/a" and {"cm_core/deep", "cm_core/inside.py", "flows"} < set(entry["deps"])
    assert not declare.write_declarations(tmp_path), "a second time there is nothing to change"


def files_behind(root, deps):
    """The files that dependencies name, those of folders included."""
    for dep in deps:
        yield from (f"{dep}/{name}" for name in files_in(root / dep)) if (root / dep).is_dir() else [dep]


@pytest.mark.parametrize("stage", STAGES)
def test_folders_name_the_files_of_the_closure_and_no_others(stage, declared):
    code = [dep for dep in declared[stage]["deps"] if not dep.startswith("out/")]
    assert sorted(files_behind(ROOT, code)) == import_closure.import_closure(ROOT, f"flows.stages.{stage}")


def test_a_folder_is_named_only_where_all_its_files_are_meant(tmp_path):
    write_tree(
        tmp_path, {name: "" for name in ("a/b/one.py", "a/b/__pycache__/one.pyc", "a/b/c/two.py", "a/d/three.py")}
    )
    inside = ["a/b/c/two.py", "a/b/one.py"]
    assert declare.whole_folders(tmp_path, [*inside, "a/d/three.py"]) == ["a"]
    assert declare.whole_folders(tmp_path, inside) == ["a/b"]
    assert declare.whole_folders(tmp_path, ["a/b/one.py"]) == ["a/b/one.py"]
    write_tree(tmp_path, {"a/b/table.json": "{}"})
    assert declare.whole_folders(tmp_path, inside) == ["a/b/c", "a/b/one.py"]


def test_params_of_an_older_version_are_named(tmp_path):
    root = make_workspace(tmp_path)
    (root / PARAMS_FILE).write_text("seed: 0\n")
    with pytest.raises(UserError, match="params/active.yaml: has no section teacher, .*; `cm use` a recipe"):
        stage_key(root, read_stages(root)["teacher"], {})


def test_dvc_and_the_stage_key_agree_on_a_folder_of_code(tmp_path):
    """Both see every change of a file in it, and neither sees compiled code."""
    root = make_workspace(tmp_path)
    (root / ".dvcignore").write_text((ROOT / ".dvcignore").read_text())
    write_tree(root, {"code/a.py": "1", "code/deep/b.py": "2"})
    tree = load_yaml(root / "dvc.yaml")
    tree["stages"]["prepare"]["deps"] = ["code"]
    (root / "dvc.yaml").write_text(json.dumps(tree))

    def dvc(*arguments):
        command = [sys.executable, "-m", "dvc", *arguments, "prepare"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

    dvc("repro")
    (entry,) = (dep for dep in read_lock(root)["prepare"]["deps"] if dep["path"] == "code")
    assert entry["md5"] == dvc_md5(root / "code")
    key = stage_key(root, read_stages(root)["prepare"], {})
    write_tree(root, {"code/deep/__pycache__/b.pyc": "compiled"})
    assert json.loads(dvc("status", "--json")) == {} and stage_key(root, read_stages(root)["prepare"], {}) == key
    write_tree(root, {"code/deep/b.py": "3"})
    assert "code" in dvc("status", "--json") and stage_key(root, read_stages(root)["prepare"], {}) != key
    assert "Running stage 'prepare'" in dvc("repro")
