"""A student that takes the weight of guidance, through stages and commands: it draws at the weight asked for."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cm_core.formats.unet2d import write_configs
from cm_core.model import load_model
from cm_core.networks import DhariwalUNetParams
from command import run
from flows.errors import UserError
from flows.inference.server import Request, ServedStudent, encode_png
from flows.recipes.recipe import load_recipe
from flows.stages.models import ORIGIN_FILE, initial_student
from small_stages import ROOT, SMALL, TRAIN, assert_student_resumes_to_the_same_bytes, run_small

GUIDED = ["conditional=true", "teacher.method.label_dropout=0.2"]
WEIGHTS = ["student.method.guidance_range=[1,4]", "student.method.guidance=2"]
DRAWN = ["sample.guidance=[1,4]", "sample.mid_sigmas=[[]]", "sample.labels=uniform", "sample.teacher_images=0"]
QUICK = ["student.train.optimizer.learning_rate=0.05", "evaluate.beside_fid=[]", "features.num_steps=10"]


def recipe_of(*changes):
    train = [f"{section}.train.{key}={value}" for section in ("teacher", "student") for key, value in TRAIN.items()]
    return load_recipe("digits-cd", [*SMALL, "data.max_images=300", *train, *GUIDED, *QUICK, *changes], root=ROOT)


RECIPE = recipe_of(*WEIGHTS, *DRAWN)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which such a student has been trained and sampled."""
    folder = tmp_path_factory.mktemp("made")
    for stage in ("prepare", "teacher", "student", "sample"):
        run_small(stage, RECIPE, folder)
    return folder


def rows_of(made):
    return {row["name"]: row for row in json.loads((made / "sample" / "samples.json").read_text())["rows"]}


def test_the_student_records_its_range_and_has_a_row_for_each_weight(made):
    spec, _ = load_model(made / "student")
    assert (spec.guidance_range, spec.guidance) == ((1.0, 4.0), 2.0)
    assert load_model(made / "teacher")[0].guidance_range is None
    rows = rows_of(made)
    weights = {"untrained": (None, 2.0), "nfe_1": (None, 2.0), "nfe_1_guidance_1": (1.0, 1.0)}
    found = {name: (row["guidance"], row["sampler"]["guidance"]) for name, row in rows.items()}
    assert found == weights | {"nfe_1_guidance_4": (4.0, 4.0)}
    drawn = [np.load(made / "sample" / rows[name]["file"]) for name in found]
    assert all((one != other).any() for one, other in zip(drawn, drawn[1:], strict=False))


def test_it_starts_from_the_teacher_and_moves_its_new_layer(made):
    origin = json.loads((made / "student" / ORIGIN_FILE).read_text())
    spec, trained = load_model(made / "student")
    first = initial_student(
        spec, init_from=origin["init_from"], seed=origin["seed"], earlier={"teacher": made / "teacher"}
    ).state_dict()
    teacher, layer = load_model(made / "teacher")[1].state_dict(), "net.embed.guidance.weight"
    assert first.keys() - teacher.keys() == {layer} and all(torch.equal(first[n], one) for n, one in teacher.items())
    assert not first[layer].any() and trained.state_dict()[layer].any()


@pytest.mark.parametrize("method", ["cd", "{kind: pd, start_steps: 2}", "{kind: dmd, student_every: 2}"])
def test_a_stopped_training_resumes_and_writes_the_same_bytes(made, tmp_path, method):
    recipe = recipe_of(f"student.method={method}", *WEIGHTS, "evaluate.beside_fid=[precision_recall]")
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    assert_student_resumes_to_the_same_bytes(recipe, tmp_path, **places)


def test_the_report_has_a_curve_over_the_weight_and_the_others_are_as_before(made):
    for stage in ("features", "edit", "evaluate"):
        run_small(stage, RECIPE, made)
    plots, metrics = made / "evaluate" / "plots", json.loads((made / "evaluate" / "metrics.json").read_text())
    fids = metrics["fid_classifier"]
    curve = [
        (float(line["guidance"]), float(line["fid"])) for line in csv.DictReader(open(plots / "fid_over_guidance.csv"))
    ]
    expected = {1.0: "nfe_1_guidance_1", 2.0: "nfe_1", 4.0: "nfe_1_guidance_4"}
    assert curve == [(weight, fids[name]) for weight, name in expected.items()]
    assert len((plots / "fid_against_nfe.csv").read_text().splitlines()) == 2
    page = (made / "evaluate" / "report.html").read_text()
    assert "FID against the weight of guidance" in page and "Student, one call, guidance 4" in page


def draw(capsys, path, *argv):
    code, said, err = run(capsys, "sample", *argv, "--n", "6", "--out", str(path))
    assert code == 0, err
    return np.load(path), said


def test_cm_sample_draws_at_the_weight_asked_for_and_at_its_own_unasked(made, tmp_path, capsys):
    student, rows = ("--model", str(made / "student")), rows_of(made)
    for name, options in (("nfe_1", ()), ("nfe_1_guidance_4", ("--guidance", "4")), ("nfe_1", ("--guidance", "2"))):
        images, said = draw(capsys, tmp_path / "drawn.npy", *student, *options)
        np.testing.assert_array_equal(images, np.load(made / "sample" / rows[name]["file"]))
        assert f", guidance {rows[name]['sampler']['guidance']:g};" in said


@pytest.mark.slow
def test_an_exported_graph_has_the_weight_asked_for_built_in(made, tmp_path, capsys):
    program, (spec, model) = tmp_path / "student.pt2", load_model(made / "student")
    noise, labels = torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 7])
    sigma = torch.full((2,), spec.noise.sigma_max)
    for options, weight in (((), 2.0), (("--guidance", "4"), 4.0)):
        argv = ("export", str(made / "student"), "--to", "torch-export", "--out", str(program), *options)
        assert run(capsys, *argv)[0] == 0
        found = torch.export.load(program).module()(noise, labels)
        with torch.no_grad():
            x0 = model(spec.noise.sigma_max * noise[:, 0], sigma, labels, guidance=weight)
        assert ((x0.permute(0, 2, 3, 1) * 127.5 + 128).clip(0, 255).int() - found.int()).abs().max() <= 1


def test_diffusers_has_no_such_input(made):
    adm = DhariwalUNetParams(channels=32, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    spec = load_model(made / "student")[0].model_copy(update={"network": adm, "noise_scale": 1000.0})
    with pytest.raises(ValueError, match="UNet2DModel has no input for the weight of guidance"):
        write_configs(spec)


def test_the_logged_model_answers_requests_at_a_weight(made, tmp_path, capsys):
    from mlflow.exceptions import MlflowException

    served = ServedStudent()
    served.load_context(SimpleNamespace(artifacts={"student": str(made / "student")}))
    for weight, options in ((None, ()), (4.0, ("--guidance", "4"))):
        (answer,) = served.predict(None, [Request(n=6, guidance=weight)])
        expected, _ = draw(capsys, tmp_path / "drawn.npy", "--model", str(made / "student"), *options)
        assert answer.images == [encode_png(pixels) for pixels in expected]
    with pytest.raises(MlflowException, match="guidance: guidance=9 lies outside"):
        served.predict(None, [Request(guidance=9.0)])


@pytest.mark.slow
def test_a_plan_counts_the_teachers_second_pass(capsys):
    asked = [f"--set={one}" for one in GUIDED]
    costs = []
    for changes in ((), WEIGHTS[:1]):
        argv = ("plan", "digits-cd", "--gpu", "h100", "--json", *asked, *(f"--set={one}" for one in changes))
        costs.append(json.loads(run(capsys, *argv)[1])["trainings"][1]["flops_per_image"])
    assert 1.2 * costs[0] < costs[1] < 2 * costs[0]


def test_a_file_carries_range_and_weight(made, tmp_path, capsys):
    one = str(tmp_path / "one.safetensors")
    argv = ("export", str(made / "student"), "--to", "safetensors", "--out", one, "--guidance", "3")
    assert run(capsys, *argv)[0] == 0
    code, said, _ = run(capsys, "import", one, "--out", str(tmp_path / "back"))
    assert code == 0 and "guidance 1 to 4 as an input, 3 unless told" in said
    spec, model = load_model(tmp_path / "back")
    assert (spec.guidance_range, spec.guidance, model.guidance) == ((1.0, 4.0), 3.0, 3.0)
    imported = recipe_of(f"student.weights={one}", *WEIGHTS)
    assert load_model(run_small("student", imported, tmp_path, prepare_dir=made / "prepare"))[0].guidance == 2.0
    with pytest.raises(UserError, match=r"guidance_range is \(1\.0, 4\.0\) in the file and None in the recipe"):
        run_small("student", recipe_of(f"student.weights={one}"), tmp_path, prepare_dir=made / "prepare")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (
            ("sample", "--model", "student", "--guidance", "5"),
            "--guidance 5: {}: guidance=5 lies outside guidance_range",
        ),
        (
            ("sample", "--model", "teacher", "--guidance", "2"),
            "--guidance 2: {}: this model takes no weight of guidance",
        ),
        (("export", "student", "--guidance", "0.5", "--to", "onnx"), "guidance=0.5 lies outside guidance_range=[1, 4]"),
        (("export", "student", "--to", "diffusers"), "UNet2DModel"),
        (("export", "student", "--guidance", "2", "--to", "hub"), "--guidance is for the other formats"),
        (("edit", "stroke", "a.png", "--label", "1", "--model", "student", "--guidance", "5"), "--guidance 5: {}: "),
    ],
)
def test_what_a_model_cannot_do_is_refused_in_one_line(made, capsys, argv, reason):
    places = {"student": str(made / "student"), "teacher": str(made / "teacher")}
    code, _, err = run(capsys, *(places.get(word, word) for word in argv))
    named = next(places[word] for word in argv if word in places)
    assert code == 2 and reason.format(named) in err and err.count("\n") == 1, err


REFUSED = [
    (["conditional=false", *WEIGHTS[:1]], r"guidance_range=\[1\.0, 4\.0\] needs labels, and conditional is false"),
    (["teacher.method.label_dropout=0", *WEIGHTS[:1]], "needs a teacher that was trained without labels too"),
    (["student.method.guidance_range=[2,4]"], r"guidance=1 lies outside guidance_range=\[2, 4\]"),
    (["sample.guidance=[2]"], r"sample\.guidance=\[2\.0\] needs a student that takes such a weight"),
    ([*WEIGHTS, "sample.guidance=[5]"], r"sample\.guidance=\[5\.0\] must lie in student\.method\.guidance_range=\[1"),
    ([*WEIGHTS, "sample.guidance=[1,2]"], r"is student\.method\.guidance=2, which has rows anyway"),
    ([*WEIGHTS, "sample.guidance=[3,3]"], "a weight is named twice"),
    (["student.method={kind: ct, guidance_range: [1, 4]}"], "unknown key"),
    (["student.method={kind: scm, guidance_range: [1, 4]}"], "kind=scm follows none with these settings"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_recipes_that_make_no_sense_are_refused_in_one_line(changes, reason):
    with pytest.raises(UserError, match=reason) as refused:
        recipe_of(*changes)
    assert "\n" not in str(refused.value)
