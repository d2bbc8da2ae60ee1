"""Training on latents, stage by stage on a few digits with a tiny autoencoder; what is refused; a model that moved."""

import json
import shutil

import numpy as np
import pytest
import torch

from cm_core.latents import DECODER_FILE, Latents, load_autoencoder, load_decoder
from cm_core.metrics.torchvision_shim import ensure_torchvision
from cm_core.model import load_model, load_spec
from cm_core.sampling import ImageNoise
from cm_core.tensors import from_pixels, to_inputs
from command import run
from flows.data.dataset import load_dataset
from flows.errors import UserError
from flows.monitor import Monitor
from flows.stages.models import few_steps
from flows.stages.training import StageStopped
from small_autoencoder import save_autoencoder
from small_stages import files, run_small, small_recipe

ensure_torchvision()
pytest.importorskip("diffusers")

CPU = torch.device("cpu")
L2 = "student.method.distance=l2"
SMALLER = ("evaluate.kid_subset_size=6", "student.evaluate_every=2", "student.evaluate_images=6")
EMAS = (
    "student.train.emas=[{kind: power, width: 0.05}, {kind: power, width: 0.1}]",
    "student.train.snapshots={count: 2}",
)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("autoencoder") / "vae")


@pytest.fixture(scope="module")
def recipe(autoencoder):
    return latent_recipe(autoencoder, "features.num_steps=20", *SMALLER, *EMAS)


def latent_recipe(autoencoder, *overrides):
    return small_recipe("digits-cd", L2, f"data.latents.autoencoder={autoencoder}", *overrides)


@pytest.fixture(scope="module")
def made(tmp_path_factory, recipe):
    """A folder in which all stages have run."""
    folder = tmp_path_factory.mktemp("made")
    for stage in ("prepare", "features", "teacher", "student", "sample", "edit"):
        run_small(stage, recipe, folder)
    return folder


def test_latents_are_the_autoencoders_standardised(made, autoencoder):
    dataset = load_dataset(made / "prepare")
    latents, net = dataset.latents, load_autoencoder(autoencoder, CPU)
    assert dataset.image_shape == (1, 8, 8) and dataset.input_shape == (2, 4, 4)
    for split in ("train", "heldout"):
        images, stored = getattr(dataset, f"{split}_images"), torch.from_numpy(np.array(dataset.inputs(split)))
        assert images.dtype == np.uint8 and stored.shape == (len(images), 2, 2, 4, 4)
        posterior = net.encode(from_pixels(torch.from_numpy(np.array(images)))).latent_dist
        mean, std = (torch.tensor(one, dtype=torch.float32).view(-1, 1, 1) for one in (latents.mean, latents.std))
        torch.testing.assert_close(stored[:, 0], (posterior.mean - mean) / std * 0.5, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stored[:, 1], posterior.std / std * 0.5, rtol=1e-4, atol=1e-6)
    train = torch.from_numpy(np.array(dataset.inputs("train")))
    drawn = torch.cat([to_inputs(train, torch.Generator().manual_seed(seed)) for seed in range(50)])
    torch.testing.assert_close(drawn.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.std((0, 2, 3)), torch.full((2,), 0.5), rtol=0, atol=0.01)


def test_models_see_latents_and_everything_drawn_is_pixels(made):
    for stage in ("teacher", "student"):
        spec = load_spec(made / stage)
        assert spec.image_shape == (2, 4, 4) and spec.pixel_shape == (1, 8, 8)
        assert spec.latents == load_dataset(made / "prepare").latents
        assert (made / stage / DECODER_FILE).read_bytes() == (made / "prepare" / DECODER_FILE).read_bytes()
        assert (made / stage / "grids" / "step_000004.png").is_file()
    rows = json.loads((made / "sample" / "samples.json").read_text())["rows"]
    assert {"student", "teacher", "untrained"} <= {row["model"] for row in rows}
    for row in rows:
        images = np.load(made / "sample" / row["file"])
        assert images.dtype == np.uint8 and images.shape == (6, 8, 8, 1)
    sets = sorted((made / "student" / "sets").glob("*.npy"))
    assert sets and all(np.load(path).shape[1:] == (8, 8, 1) for path in sets)
    assert (made / "sample" / "strips.png").is_file()


def test_samples_are_what_the_decoder_makes_of_the_students_output(made):
    from cm_core.sampling import ImageNoise

    spec, model = load_model(made / "student")
    noise = ImageNoise(0, range(6), spec.image_shape, CPU)
    x = model(spec.noise.sigma_max * noise.draw(), torch.full((6,), spec.noise.sigma_max))
    expected = load_decoder(made / "student", spec.latents, CPU)(x).numpy().astype(int)
    found = np.load(made / "sample" / "nfe_1.npy").astype(int)
    assert np.abs(found - expected).max() <= 1 and expected.std() > 1


def test_the_evaluation_compares_decoded_samples_with_the_original_images(made, recipe):
    out = run_small("evaluate", recipe, made)
    metrics = json.loads((out / "metrics.json").read_text())
    fid = next(values for key, values in metrics.items() if key.startswith("fid"))
    assert fid["real"] < fid["nfe_1"], "the floor is of original images"
    assert "2 × 4 × 4" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "form",
    [{"form": "skip"}, {"form": "euler", "euler_steps": 2}, {"form": "average_velocity"}],
    ids=lambda f: f["form"],
)
def test_drawn_latents_are_not_clipped_as_pixels_are(made, form):
    """Latents of standard deviation 0.5 go beyond -1..1; a model of pixels that did would be wrong there."""
    spec = load_spec(made / "student").model_copy(update={"form": form, "euler_steps": 2})

    def far(x, sigma, to=None):
        return torch.full_like(x, 1.5 if to is None else 1.5 * to[0].item() + 1.5)

    def drawn(spec):
        return few_steps(
            spec, far, ImageNoise(0, range(2), spec.image_shape, CPU), [1.0] if form["form"] == "skip" else []
        )

    assert drawn(spec).abs().max() > 1.4
    assert drawn(spec.model_copy(update={"latents": None})).abs().max() == 1


def test_the_gallery_of_edits_is_empty(made):
    assert json.loads((made / "edit" / "edit.json").read_text())["tasks"] == {}


def test_a_stopped_training_draws_the_same_latents_after_its_resume(made, recipe, tmp_path):
    class Stop(Monitor):
        def stop_requested(self):
            return True

    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    with pytest.raises(StageStopped):
        run_small("student", recipe, tmp_path, Stop(), **places)
    run_small("student", recipe, tmp_path, **places)
    assert files(tmp_path / "student") == files(made / "student")


def test_a_moved_model_draws_without_its_data(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(made / "student", tmp_path / "moved")
    code, out, _ = run(capsys, "sample", "--model", str(moved), "--n", "6", "--out", "drawn.npy")
    assert code == 0 and "drawn.npy: 6 images" in out
    assert np.array_equal(np.load("drawn.npy"), np.load(made / "sample" / "nfe_1.npy"))
    (moved / DECODER_FILE).unlink()
    code, _, error = run(capsys, "sample", "--model", str(moved), "--n", "1", "--out", "drawn.npy")
    assert (
        code == 2 and error.count("\n") == 1 and "decoder.safetensors, which makes images of them, is missing" in error
    )


def test_other_commands_carry_the_decoder_or_refuse_in_one_line(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(made / "student")
    code, out, _ = run(capsys, "import", model, "--out", "imported")
    assert code == 0 and "8x8x1, by latents of 4x4x2" in out
    assert (tmp_path / "imported" / DECODER_FILE).is_file()
    code, _, _ = run(capsys, "ema", model, "--width", "0.07", "--out", "average")
    assert code == 0
    for folder in ("average", f"{model}/ema1"):
        code, out, _ = run(capsys, "sample", "--model", folder, "--n", "2", "--out", "drawn.npy")
        assert code == 0 and np.load("drawn.npy").shape == (2, 8, 8, 1)
    for to in ("safetensors", "diffusers", "torch-export", "hub"):
        code, _, error = run(capsys, "export", model, "--to", to)
        assert (
            code == 2 and f"draws latents, which a decoder makes images of; --to {to} needs a model of pixels" in error
        )
    code, _, error = run(capsys, "edit", "interpolate", "--seeds", "1", "2", "--model", model)
    assert code == 2 and "editing needs a model of pixels" in error


def test_a_model_of_other_latents_is_not_imported_as_the_recipes(made, autoencoder, tmp_path):
    known = load_spec(made / "student").latents
    recipe = latent_recipe(
        autoencoder, f"student.weights={made / 'student'}", "data.max_images=30", "teacher=null", "student.method=ct"
    )
    run_small("prepare", recipe, tmp_path)
    places = {"teacher_dir": made / "teacher"}
    with pytest.raises(UserError, match=r"student.weights: .*latents.mean is \("):
        run_small("student", recipe, tmp_path, **places)
    given = {"mean": list(known.mean), "std": list(known.std)}
    latents = recipe.data.latents.model_copy(update={key: tuple(value) for key, value in given.items()})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"latents": latents})})
    run_small("prepare", recipe, tmp_path)
    assert load_dataset(tmp_path / "prepare").latents == known
    run_small("student", recipe, tmp_path, **places)
    assert load_spec(tmp_path / "student").latents == known and (tmp_path / "student" / DECODER_FILE).is_file()


def test_latents_that_are_not_finite_are_refused(autoencoder, tmp_path):
    from safetensors.torch import load_file, save_file

    own = shutil.copytree(autoencoder, tmp_path / "vae")
    path = own / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: tensor * torch.nan for name, tensor in weights.items()}, path)
    with pytest.raises(UserError, match="data.latents.autoencoder: train_latents: its latents .* are not finite"):
        run_small("prepare", latent_recipe(own), tmp_path)
    assert not (tmp_path / "prepare" / "dataset.json").exists()


@pytest.mark.parametrize(
    "overrides, part",
    [
        (["student.train.flip=true"], "student.train.flip=true: latents of mirrored images are not mirrored latents"),
        (["teacher.train.flip=true"], "teacher.train.flip=true"),
        (["teacher.method.augment={}"], "teacher.method.augment changes pixels"),
        (["student.method.distance=lpips"], "student.method.distance=lpips compares pixels"),
        (["data.channels=rgb"], "takes images of 1 channels, these have 3; set data.channels=grey"),
        (["data.resolution=9", "data.resize=stretch"], "divides each side by 2, and images of 9x9 pixels do not"),
        (["data.latents.mean=[0]", "data.latents.std=[1]"], "data.latents.mean has 1 values; the latents have 2"),
        (["data.latents.mean=[0, 0]"], "one value a channel, or are both empty"),
        (["network.channel_mult=[1, 1, 1, 1]"], "4x4"),
    ],
)
def test_recipes_that_cannot_be_are_refused_before_work(autoencoder, overrides, part):
    with pytest.raises(UserError) as refused:
        latent_recipe(autoencoder, *overrides)
    assert part in str(refused.value) and "\n" not in str(refused.value)


def test_images_of_a_size_known_only_from_their_headers_are_refused_before_they_are_decoded(autoencoder, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("L", (9, 9), index).save(tmp_path / "images" / f"{index}.png")
    images = f"data.source={{kind: images, path: {tmp_path / 'images'}}}"
    with pytest.raises(UserError, match="divides each side by 2, and images of 9x9 pixels do not divide so"):
        run_small("prepare", latent_recipe(autoencoder, images), tmp_path)
    assert not list((tmp_path / "prepare").glob("*.npy"))


def test_an_autoencoder_is_looked_for_before_anything_runs(autoencoder, tmp_path):
    from flows.data.check import check_latents

    for path, part in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "holds no config.json")):
        latents = latent_recipe(autoencoder).data.latents.model_copy(update={"autoencoder": str(path), "sha256": None})
        with pytest.raises(UserError, match=f"data.latents.autoencoder: .*{part}"):
            check_latents(latents, tmp_path)
    check_latents(latent_recipe(autoencoder).data.latents, tmp_path)


def test_a_recipe_records_the_checksum_of_its_autoencoder(autoencoder, tmp_path):
    from flows.recipes.recipe import load_recipe
    from small_stages import ROOT

    own = shutil.copytree(autoencoder, tmp_path / "vae")
    overrides = [L2, "data.latents.autoencoder=vae"]
    recipe = load_recipe("digits-cd", overrides, root=ROOT, base=tmp_path)
    assert recipe.data.latents.autoencoder == str(own) and recipe.data.latents.sha256
    (own / "more").write_text("other")
    with pytest.raises(UserError, match="sha256 of its files is"):
        recipe.data.latents.find(tmp_path / "into", Monitor())


def test_the_spread_of_the_latents_is_that_of_the_noise_levels():
    from cm_core.latents import SPREAD
    from cm_core.noise import Noise

    assert SPREAD == Noise().sigma_data
    one = Latents(decoder="0", pixel_shape=(1, 8, 8), mean=(1.0,), std=(2.0,))
    shift, scale = one.shift_and_scale(CPU)
    assert (shift.item(), scale.item()) == (1.0, 4.0)


def test_a_logged_model_holds_its_decoder_and_asks_for_diffusers(made):
    from types import SimpleNamespace

    from flows.inference.package import packaged_student, weights_of
    from flows.inference.server import Request, ServedStudent, encode_png
    from flows.tracking.tracker import MODEL_FILES

    student = made / "student"
    with packaged_student({name: student / name for name in (*MODEL_FILES, DECODER_FILE)}, [], "m-1") as folder:
        assert "\ndiffusers==" in (folder / "requirements.txt").read_text()
        served = ServedStudent()
        served.load_context(SimpleNamespace(artifacts={"student": str(weights_of(folder))}))
        images = served.predict(None, [Request(n=6)])[0].images
    assert images == [encode_png(pixels) for pixels in np.load(made / "sample" / "nfe_1.npy")]
    with packaged_student({name: student / name for name in MODEL_FILES}, [], "m-1") as folder:
        assert "diffusers" not in (folder / "requirements.txt").read_text()


def test_prepare_takes_the_gpu_for_latents_alone(recipe, tmp_path):
    from flows.recipes.recipe import write_active
    from flows.workspace.dvc_files import read_stages
    from small_stages import ROOT

    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    assert read_stages(tmp_path)["prepare"].needs == "cpu"
    for one, needs in ((recipe, "gpu"), (small_recipe("digits-cd"), "cpu")):
        write_active(one, tmp_path)
        assert read_stages(tmp_path)["prepare"].needs == needs
        assert read_stages(tmp_path)["student"].needs == "gpu"


def test_the_plan_counts_the_network_of_the_latents(autoencoder, capsys, monkeypatch):
    from small_stages import ROOT, SMALL

    monkeypatch.chdir(ROOT)
    sets = [word for one in (*SMALL, L2) for word in ("--set", one)]
    flops = []
    for more in ([], ["--set", f"data.latents.autoencoder={autoencoder}"]):
        code, out, _ = run(capsys, "plan", "digits-cd", *sets, *more, "--gpu", "h100", "--json")
        assert code == 0
        flops.append(json.loads(out)["trainings"][0]["flops_per_image"])
    assert 0.2 < flops[1] / flops[0] < 0.4, "4x4 latents in place of 8x8 pixels"
    code, _, error = run(capsys, "plan", "digits-cd", *sets, "--set", "data.latents.autoencoder=nowhere")
    assert code == 2 and "data.latents.autoencoder: not here" in error


def test_a_distance_that_depends_on_the_size_takes_that_of_the_latents(made, autoencoder, tmp_path, monkeypatch):
    from cm_core.distances import PseudoHuber

    shapes, build = [], PseudoHuber.build
    monkeypatch.setattr(PseudoHuber, "build", lambda self, shape: shapes.append(shape) or build(self, shape))
    recipe = latent_recipe(autoencoder, "student.method.distance=pseudo_huber")
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "teacher_dir")}
    run_small("student", recipe, tmp_path, **places)
    assert set(shapes) == {(2, 4, 4)}


def test_a_search_measures_decoded_images(made, recipe, tmp_path):
    from flows.commands.search import Scorer

    (tmp_path / "out").symlink_to(made)
    scorer = Scorer(recipe, tmp_path, 6)
    assert np.isfinite(scorer.fid([80.0, 1.0], "one candidate"))


def test_the_page_shows_images_and_offers_no_edit(made, tmp_path):
    from flows.play.studio import EDITS, Studio

    model = str(made / "student")
    studio = Studio(tmp_path, model)
    studio.local_models()
    found = studio.describe(model)
    assert (found["channels"], found["height"], found["width"]) == (1, 8, 8)
    assert found["refused"].keys() == set(EDITS)


def test_settings_of_the_gallery_do_not_bind_latents_that_have_none(made, autoencoder, tmp_path):
    recipe = latent_recipe(autoencoder, "edit.factor=8")  # more than a side of the latents
    places = {name: made / name.removesuffix("_dir") for name in ("prepare_dir", "student_dir")}
    out = run_small("edit", recipe, tmp_path, **places)
    assert json.loads((out / "edit.json").read_text())["tasks"] == {}
