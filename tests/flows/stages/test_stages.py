"""The stages that train and sample, called as plain functions on a few digits: no engine, no server."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm_core.formats.single import write_single
from cm_core.methods.cd import CD
from cm_core.methods.pd import PD
from cm_core.model import ModelSpec, load_model
from cm_core.networks.mlp import MLPParams
from cm_core.noise import Noise
from cm_core.tensors import to_pixels
from cm_core.training import loss_scale
from cm_core.training.config import Train
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages.models import fixed_labels
from flows.stages.student import Student, draw_samples
from flows.stages.training import StageStopped, TrainingLog
from small_stages import assert_student_resumes_to_the_same_bytes, files, run_small, small_recipe

TWO_EMAS = "[{kind: constant, decay: 0}, {kind: constant, decay: 0.9}]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which cd has gone through prepare, teacher, student and sample."""
    folder, recipe = tmp_path_factory.mktemp("made"), small_recipe("digits-cd")
    for stage in ("prepare", "teacher", "student", "sample"):
        run_small(stage, recipe, folder)
    return folder


def test_teacher_and_student_write_models_curves_grids_and_the_rules_of_their_averages(made):
    recipe = small_recipe("digits-cd")
    for stage, form in (("teacher", "denoiser"), ("student", "skip")):
        spec, model = load_model(made / stage)
        assert spec.form == form and spec.image_shape == (1, 8, 8)
        steps = [json.loads(line)["step"] for line in (made / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4]
        assert [path.name for path in sorted((made / stage / "grids").iterdir())] == [
            "step_000002.png",
            "step_000004.png",
        ]
        rules = [rule.model_dump(mode="json") for rule in getattr(recipe, stage).train.emas]
        assert json.loads((made / stage / "emas.json").read_text()) == rules


def test_a_stopped_training_resumes_and_writes_the_same_bytes(made, tmp_path):
    class Stop(Monitor):
        def stop_requested(self):
            return True

    recipe, remarks = small_recipe("digits-cd"), []
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    with pytest.raises(StageStopped, match="stopped after step 1; the training state is saved"):
        run_small("student", recipe, tmp_path, Stop(), **places)
    assert not (tmp_path / "student" / "model.json").exists()

    class Listen(Monitor):
        def remark(self, text):
            remarks.append(text)

    run_small("student", recipe, tmp_path, Listen(), **places)
    assert "resuming from step 1" in remarks
    assert files(tmp_path / "student") == files(made / "student")


def test_a_loss_that_is_not_finite_names_the_way_out_which_goes_on_from_the_saved_state(made, tmp_path, monkeypatch):
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    loss = CD.loss

    def spoiled(self, models, batch, context):
        found = loss(self, models, batch, context)
        return found._replace(per_sample=found.per_sample / (context.step != 2))

    monkeypatch.setattr(CD, "loss", spoiled)
    with pytest.raises(UserError, match=r"^student: the loss became inf at step 2.*student\.train\.on_nonfinite=skip"):
        run_small("student", small_recipe("digits-cd"), tmp_path, **places)
    remarks = Listen()
    run_small("student", small_recipe("digits-cd", "student.train.on_nonfinite=skip"), tmp_path, remarks, **places)
    assert "resuming from step 2" in remarks.remarks and remarks.numbers["nonfinite_steps"] == 1
    with pytest.raises(UserError, match="left out 1 steps whose loss was not finite"):
        run_small("student", small_recipe("digits-cd"), tmp_path, **places)


def test_gradients_that_fp16_does_not_hold_name_another_precision(made, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", loss_scale.LEAST)
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    with pytest.raises(UserError, match=r"^student: 0 steps overflowed.*set student\.train\.precision=bf16"):
        run_small("student", small_recipe("digits-cd", "student.train.precision=fp16"), tmp_path, **places)


def test_sets_of_images_are_drawn_during_the_training_of_each_ema_also_across_a_resume(made, tmp_path):
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    asked = (f"student.train.emas={TWO_EMAS}", "student.evaluate_every=2", "student.evaluate_images=5")
    recipe = small_recipe("digits-cd", *asked)
    assert_student_resumes_to_the_same_bytes(recipe, tmp_path, **places)
    rows = ("nfe_1", "nfe_2", "nfe_1_ema1", "nfe_2_ema1")
    sets = {path.name: np.load(path) for path in (tmp_path / "whole" / "student" / "sets").iterdir()}
    assert sets.keys() == {f"step_00000{step}-{row}.npy" for step in (2, 4) for row in rows}
    assert {images.shape for images in sets.values()} == {(5, 8, 8, 1)}
    assert (sets["step_000004-nfe_1.npy"] != sets["step_000004-nfe_1_ema1.npy"]).any()
    plain = run_small("student", small_recipe("digits-cd", asked[0]), tmp_path / "plain", **places)
    for name in ("ema.safetensors", "metrics.jsonl"):
        assert (plain / name).read_bytes() == (tmp_path / "whole" / "student" / name).read_bytes(), (
            "nothing else changes"
        )


METHODS = {
    "ict": {"nfe_1", "nfe_2"},
    "ect": {"nfe_1", "nfe_2"},
    "scm": {"nfe_1", "nfe_2"},
    "{kind: pd, start_steps: 4, end_steps: 2}": {"nfe_2"},
    "cm_inf": {"nfe_1", "nfe_2"},
    "meanflow": {"nfe_1", "nfe_2"},
    "{kind: dmd, student_every: 2}": {"nfe_1"},
}


def test_a_training_that_dies_while_its_log_is_rewritten_keeps_the_log(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        TrainingLog(tmp_path, before=2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    monkeypatch.undo()
    assert TrainingLog(tmp_path, before=2).metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_resumes_to_the_same_bytes_and_samples(made, tmp_path, method):
    recipe = small_recipe("digits-cd", f"student.method={method}", "sample.teacher_images=0")
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    assert_student_resumes_to_the_same_bytes(recipe, tmp_path, **places)
    run_small("sample", recipe, tmp_path / "whole", **places)
    index = json.loads((tmp_path / "whole" / "sample" / "samples.json").read_text())
    assert {row["name"] for row in index["rows"]} == METHODS[method] | {"untrained"}
    samplers = {"meanflow": "flow_map", "{kind: pd, start_steps: 4, end_steps: 2}": "euler"}
    assert {row["sampler"]["kind"] for row in index["rows"]} == {samplers.get(method, "multistep")}


def test_a_weaker_teacher_guides_the_teachers_row(made, tmp_path):
    """By itself it changes nothing; by its untrained copy it does, and no labels are asked for."""
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir", "student_dir")}
    spec, teacher = load_model(made / "teacher")
    weak = {name: 0.5 * weights for name, weights in teacher.state_dict().items()}
    write_single(tmp_path / "same.safetensors", spec, teacher.state_dict())
    write_single(tmp_path / "weak.safetensors", spec, weak)
    write_single(tmp_path / "other.safetensors", spec.model_copy(update={"form": "skip"}), weak)
    drawn = {}
    for name in ("same", "weak"):
        asked = ["sample.teacher_sampler.guidance=2", f"sample.weak_teacher.weights={tmp_path / name}.safetensors"]
        run_small("sample", small_recipe("digits-cd", *asked), tmp_path / name, **places)
        rows = json.loads((tmp_path / name / "sample" / "samples.json").read_text())["rows"]
        (row,) = (row for row in rows if row["model"] == "teacher")
        assert row["nfe"] == 6 and row["sampler"]["guidance"] == 2 and "weak_teacher" in row["sampler"]
        drawn[name] = np.load(tmp_path / name / "sample" / row["file"]).astype(int)
    plain = np.load(made / "sample" / "teacher_nfe_3.npy").astype(int)
    assert np.abs(drawn["same"] - plain).max() <= 1 and np.abs(drawn["weak"] - plain).max() > 1
    asked = ["sample.teacher_sampler.guidance=2", f"sample.weak_teacher.weights={tmp_path / 'other'}.safetensors"]
    with pytest.raises(
        UserError, match=r"sample\.weak_teacher\.weights: form is 'skip', and the teacher's is 'denoiser'"
    ):
        run_small("sample", small_recipe("digits-cd", *asked), tmp_path / "other", **places)


def test_a_grid_of_progressive_distillation_takes_the_steps_of_its_halving():
    student = Student(method=PD(start_steps=32), train=Train(num_steps=80))
    spec = ModelSpec(form="euler", network=MLPParams(width=8), noise=Noise(), image_shape=(1, 2, 2))
    model, calls = spec.build().eval(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    taken = []
    for step in (1, 10, 11, 30, 40, 41, 80):
        draw_samples(model, step, spec=spec, student=student, device=torch.device("cpu"), decode=to_pixels)
        taken.append(len(calls))
        calls.clear()
    assert taken == [16, 16, 16, 8, 4, 2, 1], "rounds of 32, 16, 8, 4, 2 and 1; a grid takes 16 at most"


def test_samples_have_their_rows_and_do_not_depend_on_the_batch(made, tmp_path):
    index = json.loads((made / "sample" / "samples.json").read_text())
    rows = {row["name"]: row for row in index["rows"]}
    assert {name: row["nfe"] for name, row in rows.items()} == {
        "nfe_1": 1,
        "nfe_2": 2,
        "untrained": 1,
        "teacher_nfe_3": 3,
    }
    assert rows["nfe_2"]["sampler"] == {"kind": "multistep"} and rows["teacher_nfe_3"]["sampler"]["solver"] == "heun"
    for row in rows.values():
        assert np.load(made / "sample" / row["file"]).shape == (6, 8, 8, 1)
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir", "student_dir")}
    run_small("sample", small_recipe("digits-cd", "sample.batch_size=6"), tmp_path, **places)
    for row in rows.values():
        a, b = (np.load(folder / "sample" / row["file"]).astype(int) for folder in (made, tmp_path))
        assert np.abs(a - b).max() <= 1  # convolutions of another batch size may round differently


def test_every_ema_gets_rows_of_its_own_weights_or_those_named_do(made, tmp_path):
    emas = [f"student.train.emas={TWO_EMAS}", f"teacher.train.emas={TWO_EMAS}"]
    recipe = small_recipe("digits-cd", *emas)
    for stage in ("teacher", "student", "sample"):
        run_small(stage, recipe, tmp_path, prepare_dir=made / "prepare")
    rows = {row["name"]: row for row in json.loads((tmp_path / "sample" / "samples.json").read_text())["rows"]}
    students = {"nfe_1": 0, "nfe_2": 0, "nfe_1_ema1": 1, "nfe_2_ema1": 1}
    others = {"untrained": 0, "teacher_nfe_3": 0, "teacher_nfe_3_ema1": 1}
    assert {name: row["ema"] for name, row in rows.items()} == students | others
    for first, other in (("nfe_1", "nfe_1_ema1"), ("teacher_nfe_3", "teacher_nfe_3_ema1")):
        a, b = (np.load(tmp_path / "sample" / rows[name]["file"]) for name in (first, other))
        assert (a != b).any()

    recipe = small_recipe("digits-cd", *emas, "sample.emas=[1]", "sample.teacher_images=0")
    run_small("sample", recipe, tmp_path, prepare_dir=made / "prepare")
    rows = json.loads((tmp_path / "sample" / "samples.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["nfe_1_ema1", "nfe_2_ema1", "untrained"]


def test_a_teacher_row_of_another_number_of_images_says_so_in_its_name(made, tmp_path):
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir", "student_dir")}
    run_small("sample", small_recipe("digits-cd", "sample.teacher_images=4"), tmp_path, **places)
    rows = json.loads((tmp_path / "sample" / "samples.json").read_text())["rows"]
    assert rows[-1]["name"] == "teacher_nfe_3_of_4" and rows[-1]["num_images"] == 4


def test_the_untrained_row_is_the_teacher_where_the_student_starts_from_it(made):
    origin = json.loads((made / "student" / "origin.json").read_text())
    assert origin["init_from"] == "teacher"


def test_without_a_teacher_a_marker_stands_and_the_student_starts_at_random(made, tmp_path):
    recipe = small_recipe("digits-ct")
    places = {"prepare_dir": made / "prepare"}
    run_small("teacher", recipe, tmp_path, **places)
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["none.json"]
    run_small("student", recipe, tmp_path, **places)
    assert json.loads((tmp_path / "student" / "origin.json").read_text())["init_from"] == "random"
    run_small("sample", recipe, tmp_path, **places)
    names = [row["name"] for row in json.loads((tmp_path / "sample" / "samples.json").read_text())["rows"]]
    assert names == ["nfe_1", "nfe_2", "untrained"]


def test_students_of_labels_sample_classes_as_often_as_the_data(made, tmp_path, monkeypatch):
    recipe = small_recipe("digits-ct", "conditional=true", "data.max_images=200", "sample.num_images=200")
    with pytest.raises(UserError, match=r"2 of 10 classes have no training image \(1, 8\); raise data.max_images"):
        run_small("student", recipe, tmp_path, prepare_dir=made / "prepare", teacher_dir=made / "teacher")
    for stage in ("prepare", "teacher", "student"):
        run_small(stage, recipe, tmp_path)
    assert load_model(tmp_path / "student")[0].num_classes == 10
    drawn = []
    monkeypatch.setattr(
        "flows.stages.sample.fixed_labels", lambda *given: drawn.append(fixed_labels(*given)) or drawn[-1]
    )
    run_small("sample", recipe, tmp_path)
    rows = json.loads((tmp_path / "sample" / "samples.json").read_text())
    assert rows["labels"].startswith("every class as often as among the training images")
    labels = np.load(tmp_path / "prepare" / "train_labels.npy")
    first = torch.cat(drawn)[:200].bincount(minlength=10)
    assert np.abs(first.numpy() - np.bincount(labels)).max() <= 2
    drawn.clear()
    uniform = recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"labels": "uniform"})})
    run_small("sample", uniform, tmp_path)
    assert torch.cat(drawn)[:200].bincount(minlength=10).tolist() == [20] * 10
    assert json.loads((tmp_path / "sample" / "samples.json").read_text())["labels"].startswith("every class equally")


def test_fewer_images_than_a_batch_are_refused_before_training(made, tmp_path):
    recipe = small_recipe("digits-ct", "student.train.batch_size=500")
    with pytest.raises(UserError, match=r"48 training images are fewer than train\.batch_size=500"):
        run_small("student", recipe, tmp_path, prepare_dir=made / "prepare", teacher_dir=made / "teacher")


def test_distilling_without_a_teacher_is_refused(made, tmp_path):
    run_small("teacher", small_recipe("digits-ct"), tmp_path, prepare_dir=made / "prepare")
    with pytest.raises(UserError, match="needs a teacher"):
        run_small("student", small_recipe("digits-cd"), tmp_path, prepare_dir=made / "prepare")


def test_lpips_without_its_weights_names_file_and_alternatives(tmp_path):
    from cm_core.distances import Lpips
    from flows.stages.student import Student, _build_distance

    student = Student.model_validate({"method": {"kind": "cd", "distance": {"kind": "lpips", "weights": "none.pth"}}})
    assert isinstance(student.method.distance, Lpips)
    with pytest.raises(UserError, match=r"none\.pth"):
        _build_distance("student", student, None, tmp_path, None, Monitor())


def test_strips_come_from_training_images_where_none_are_held_out(made, tmp_path):
    recipe = small_recipe("digits-cd", "data.heldout_fraction=0")
    run_small("prepare", recipe, tmp_path)
    run_small("sample", recipe, tmp_path, teacher_dir=made / "teacher", student_dir=made / "student")
    assert (tmp_path / "sample" / "strips.png").stat().st_size > 0


class Listen(Monitor):
    """Keeps what a stage says."""

    def __init__(self):
        self.remarks, self.images, self.numbers = [], [], {}

    def remark(self, text):
        self.remarks.append(text)

    def image(self, key, path, step):
        assert path.exists()
        self.images.append(key)

    def metrics(self, values, step):
        self.numbers |= values


def test_the_gallery_shows_every_task_that_grey_images_allow(made, tmp_path):
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "student_dir")}
    monitor = Listen()
    out = run_small("edit", small_recipe("digits-cd"), tmp_path, monitor, **places)
    index = json.loads((out / "edit.json").read_text())
    tasks = ["inpaint", "superres", "stroke", "denoise", "interpolate"]
    assert list(index["tasks"]) == tasks and index["split"] == "heldout"
    assert monitor.remarks == ["colorize is left out: the images are grey"]
    assert monitor.images == [f"edit/{name}" for name in tasks]
    assert {path.name for path in out.iterdir()} == {"edit.json", *(f"{name}.png" for name in tasks)}
    assert index["tasks"]["inpaint"]["known_error"] == 0
    assert 0 < index["tasks"]["superres"]["known_error"]
    assert [index["tasks"][name]["nfe"] for name in tasks] == [2, 2, 2, 1, 1]
    assert monitor.numbers["rmse/denoise"] == index["tasks"]["denoise"]["rmse"]
    again = run_small("edit", small_recipe("digits-cd"), tmp_path / "again", **places)
    assert files(out) == files(again)


def test_in_the_gallery_more_results_change_none(made, tmp_path):
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "student_dir")}
    rows = []
    for count in (1, 3):
        recipe = small_recipe("digits-cd", "edit.tasks=[inpaint]", f"edit.num_results={count}")
        out = run_small("edit", recipe, tmp_path / str(count), **places)
        rows.append(np.asarray(Image.open(out / "inpaint.png"))[:, -100:])
    height = len(rows[0])
    assert np.abs(rows[0].astype(int) - rows[1][:height]).max() <= 1  # batches of another size may round differently


def test_students_of_colours_and_labels_colourise(made, tmp_path):
    colours = ("data.channels=rgb", "data.max_images=120")
    recipe = small_recipe("digits-ct", "conditional=true", *colours, "edit.tasks=[colorize, interpolate]")
    for stage in ("prepare", "teacher", "student"):
        run_small(stage, recipe, tmp_path)
    for mask in ("right", "pixels"):
        changed = recipe.model_copy(update={"edit": recipe.edit.model_copy(update={"mask": mask})})
        out = run_small("edit", changed, tmp_path)
        assert list(json.loads((out / "edit.json").read_text())["tasks"]) == ["colorize", "interpolate"]


def test_edits_that_do_not_fit_the_images_are_refused(made, tmp_path):
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "student_dir")}
    recipe = small_recipe("digits-cd")
    for change, reason in (
        ({"factor": 3}, "edit.factor=3 does not divide images of 8x8 pixels"),
        ({"denoise_sigma": 0.001}, "edit.denoise_sigma=0.001: noise levels must lie above sigma_min=0.002"),
        ({"stroke_sigma": 0.003}, "edit.stroke_sigma=0.003: noise levels must lie above sigma_min=0.002"),
        ({"stroke_sigma": 81.0}, "edit.stroke_sigma=81: noise levels must lie .* up to sigma_max=80"),
    ):
        changed = recipe.model_copy(update={"edit": recipe.edit.model_copy(update=change)})
        with pytest.raises(UserError, match=reason):
            run_small("edit", changed, tmp_path, **places)
    recipe.edit.model_copy(update={"factor": 3, "tasks": ("inpaint",)}).check((1, 8, 8), recipe.noise)


def test_a_student_that_is_no_consistency_model_has_no_gallery(made, tmp_path):
    recipe = small_recipe("digits-cd", "student.method={kind: pd, start_steps: 4, end_steps: 2}")
    run_small("student", recipe, tmp_path, prepare_dir=made / "prepare", teacher_dir=made / "teacher")
    monitor = Listen()
    out = run_small("edit", recipe, tmp_path, monitor, prepare_dir=made / "prepare")
    assert json.loads((out / "edit.json").read_text())["tasks"] == {}
    assert monitor.remarks == ["no gallery: the student is no consistency model of all noise levels"]
