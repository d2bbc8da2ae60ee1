"""The stage `base`, and students that start from what it makes."""

import json

import pytest
import torch

from cm_core.methods.tcm import TCM
from cm_core.model import load_model, load_spec
from flows.errors import UserError
from flows.inference.generate import usual_mid_sigmas
from flows.monitor import Monitor
from small_stages import TRAIN, files, run_small, small_recipe

SHORT = [f"base.train.{key}={value}" for key, value in TRAIN.items()]
THEN_TCM = [*SHORT, "base.method=ect", "student.method=tcm", "sample.mid_sigmas=[[], [1.0]]"]


class Listen(Monitor):
    def __init__(self):
        self.said = []

    def remark(self, text):
        self.said.append(text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which ECT has made the base of a TCM student, and that has been sampled."""
    folder, recipe = tmp_path_factory.mktemp("made"), small_recipe("digits-cd", *THEN_TCM)
    for stage in ("prepare", "teacher", "base", "student", "sample"):
        run_small(stage, recipe, folder)
    return folder


def test_without_a_base_a_marker_stands_and_the_student_starts_as_ever(made, tmp_path):
    monitor, places = Listen(), {"prepare_dir": made / "prepare", "teacher_dir": made / "teacher"}
    out = run_small("base", small_recipe("digits-cd"), tmp_path, monitor, **places)
    assert files(out).keys() == {(out / "none.json").relative_to(out)} and monitor.said == ["this recipe has no base"]
    student = run_small("student", small_recipe("digits-cd"), tmp_path, **places)
    assert json.loads((student / "origin.json").read_text())["init_from"] == "teacher"


def test_the_base_is_a_student_of_its_own_seed(made, tmp_path):
    """It is trained as a student would be, but sees other noise."""
    recipe = small_recipe("digits-cd", "student.method=ect")
    places = {"prepare_dir": made / "prepare", "teacher_dir": made / "teacher"}
    student = run_small("student", recipe, tmp_path, **places)
    assert files(student).keys() == files(made / "base").keys()
    assert load_spec(student) == load_spec(made / "base")
    first, other = (
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (student, made / "base")
    )
    assert first["step"] == other["step"] == 1 and first["loss"] != other["loss"], "of the same weights, the teacher's"


def test_the_student_starts_from_the_base_which_answers_below_the_split(made, tmp_path, monkeypatch):
    seen, loss = [], TCM.loss

    def watched(self, models, batch, context):
        if context.step == 0:
            seen.extend(
                {name: t.clone() for name, t in one.state_dict().items()} for one in (models.student, models.base)
            )
        return loss(self, models, batch, context)

    monkeypatch.setattr(TCM, "loss", watched)
    recipe = small_recipe("digits-cd", *THEN_TCM, "student.dropout=0.4")
    places = {f"{name}_dir": made / name for name in ("prepare", "teacher", "base")}
    out = run_small("student", recipe, tmp_path, **places)
    _, base = load_model(made / "base")
    for weights in seen:
        assert weights.keys() == base.state_dict().keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())
    assert json.loads((out / "origin.json").read_text())["init_from"] == "base"
    assert (load_spec(out).truncated_at, load_spec(out).form) == (1.0, "unshifted")
    assert load_spec(made / "base").truncated_at is None


def test_the_row_before_training_is_the_base(made):
    rows = {row["name"]: row for row in json.loads((made / "sample" / "samples.json").read_text())["rows"]}
    assert rows.keys() == {"nfe_1", "nfe_2", "untrained", "teacher_nfe_3"} and rows["nfe_2"]["sigmas"] == [80.0, 1.0]
    assert (made / "sample" / "untrained.npy").read_bytes() != (made / "sample" / "nfe_1.npy").read_bytes()


def test_a_truncated_student_is_drawn_and_edited_where_it_was_trained_alone(made, tmp_path):
    places = {f"{name}_dir": made / name for name in ("prepare", "teacher", "base", "student")}
    with pytest.raises(UserError, match=r"sample.mid_sigmas: this model was trained at noise levels from 1 on"):
        run_small("sample", small_recipe("digits-cd"), tmp_path, **places)
    monitor = Listen()
    out = run_small("edit", small_recipe("digits-cd"), tmp_path, monitor, **places)
    assert json.loads((out / "edit.json").read_text())["tasks"] == {}
    assert monitor.said == ["no gallery: the student is no consistency model of all noise levels"]


def test_the_usual_levels_of_a_truncated_student_lie_where_it_was_trained(made):
    spec = load_spec(made / "student")
    assert usual_mid_sigmas(spec, 1, [[], [0.8], [3.0]]) == [3.0]
    several = usual_mid_sigmas(spec, 3, [[], [0.8]])
    spec.check_levels([80.0, *several])
    assert len(several) == 3 and usual_mid_sigmas(load_spec(made / "base"), 1, [[], [0.8]]) == [0.8]


def test_mid_training_then_ect(made, tmp_path):
    """CMT's model is the start of a consistency tuning whose teacher is not used again."""
    overrides = [*SHORT, "base.method={kind: cmt, num_steps: 4}", "student.method=ect"]
    recipe = small_recipe("digits-cd", *overrides)
    for stage in ("base", "student"):
        run_small(stage, recipe, tmp_path, prepare_dir=made / "prepare", teacher_dir=made / "teacher")
    origins = [json.loads((tmp_path / stage / "origin.json").read_text()) for stage in ("base", "student")]
    assert [(one["method"], one["init_from"]) for one in origins] == [("cmt", "teacher"), ("ect", "base")]


def test_a_base_that_is_not_there_is_named(made, tmp_path):
    recipe = small_recipe("digits-cd", *THEN_TCM)
    with pytest.raises(UserError, match="student.method.kind=tcm needs a base, and the recipe has base: null"):
        run_small("student", recipe, tmp_path, prepare_dir=made / "prepare", teacher_dir=made / "teacher")
