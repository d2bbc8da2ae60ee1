"""`cm edit` on real picture files: what comes back unchanged, what is said aloud, what is refused."""

import numpy as np
import pytest
from PIL import Image

from cm_core.editing import LUMINANCE
from command import run
from flows.commands.edit import RESIZES
from flows.commands.editor import TRAITS as SAID
from flows.data.images import RESIZE, TRAITS
from flows.recipes.recipe import Recipe, write_active
from miniature import save_untrained

MODELS = {
    "student": {"form": "skip", "image_shape": (3, 8, 8)},
    "piecewise": {"form": "piecewise", "image_shape": (3, 8, 8)},
    "grey": {"form": "skip", "image_shape": (1, 8, 8)},
    "classes": {"form": "skip", "image_shape": (3, 8, 8), "num_classes": 3},
    "weights": {"form": "skip", "image_shape": (3, 8, 8), "guidance_range": (1.0, 8.0), "guidance": 2.0},
    "wide": {"form": "skip", "image_shape": (3, 4, 8)},
    "unshifted": {"form": "unshifted", "image_shape": (3, 8, 8)},
    "teacher": {"form": "denoiser", "image_shape": (3, 8, 8)},
    "halved": {"form": "euler", "image_shape": (3, 8, 8)},
    "flow_map": {"form": "average_velocity", "image_shape": (3, 8, 8)},
    "generator": {"form": "generator", "image_shape": (3, 8, 8)},
    "truncated": {"form": "unshifted", "image_shape": (3, 8, 8), "truncated_at": 1.0},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A workspace with untrained models whose images all differ, and pictures of many kinds."""
    root = tmp_path_factory.mktemp("editing")
    (root / "params").mkdir()
    (root / "dvc.yaml").write_text("stages: {}\n")
    write_active(Recipe(), root)
    for name, what in MODELS.items():
        save_untrained(root / "out" / name, **what)
    write_pictures(root)
    return root


def write_pictures(root):
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 200, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "a.png")
    Image.fromarray(pixels[::-1].copy()).save(root / "b.png")
    Image.fromarray(pixels[..., 0]).save(root / "grey.png")
    Image.fromarray(pixels[:4, :4].copy()).save(root / "small.png")
    Image.fromarray(pixels[:4].copy()).save(root / "wide.png")
    Image.fromarray(pixels).quantize(16).save(root / "palette.gif")
    alpha = np.dstack([pixels, np.full((8, 8), 255, np.uint8)])
    alpha[0, :, 3] = 0
    Image.fromarray(alpha).save(root / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise brings it upright
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / "photo.jpg", exif=exif)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(mask).convert("RGBA").convert("P").save(root / "mask_palette.png")
    Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), 255 - mask])).save(root / "mask_alpha.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(root / "black.png")
    Image.fromarray(np.full((60, 40), 255, np.uint8)).save(root / "mask_of_photo.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(root / "mask5.png")
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:60])
    (root / "text.png").write_text("no picture")


@pytest.fixture
def edit(workspace, tmp_path, monkeypatch, capsys):
    """Run `cm edit ...`; return the results, uint8 [N, H, W, C], and what was said."""
    monkeypatch.chdir(workspace)

    def edit(*argv, out="edited"):
        code, said, err = run(capsys, "edit", *argv, "--out", str(tmp_path / out))
        assert code == 0, err
        assert (tmp_path / f"{out}.png").exists()
        paths = sorted((tmp_path / out).iterdir())
        assert [path.name for path in paths] == [f"{index:06d}.png" for index in range(len(paths))]
        return np.stack([np.asarray(Image.open(path)) for path in paths]), said

    return edit


def opened(name):
    return np.asarray(Image.open(name).convert("RGB"))


@pytest.mark.parametrize("model", ["student", "piecewise", "unshifted"])
@pytest.mark.parametrize("mask", ["mask.png", "mask_palette.png", "mask_alpha.png"])
def test_inpaint_keeps_every_known_pixel(edit, mask, model):
    results, said = edit("inpaint", "a.png", "--mask", mask, "--steps", "3", "--n", "4", "--model", f"out/{model}")
    unknown = np.asarray(Image.open("mask.png")) > 0
    assert (results[:, ~unknown] == opened("a.png")[~unknown]).all()
    assert len({result[unknown].tobytes() for result in results}) == 4
    assert "23% of the pixels are to be invented" in said and "3 network calls at sigma 80 to" in said


def test_the_mask_of_a_photo_goes_the_way_of_the_photo(edit):
    results, said = edit("inpaint", "photo.jpg", "--mask", "mask_of_photo.png", "--steps", "2", "--n", "2")
    assert results.shape == (2, 8, 8, 3)
    assert "center-crop from 40x60 to 8x8, turned upright as its EXIF says" in said and "100% of the pixels" in said


def test_colorize_keeps_the_luminance(edit):
    for name in ("a.png", "grey.png"):
        results, _ = edit("colorize", name, "--steps", "2", "--n", "3")
        weights = np.array(LUMINANCE) / sum(LUMINANCE)
        inside = ((results > 0) & (results < 255)).all(-1)  # elsewhere rounding to pixels clips
        change = results @ weights - opened(name) @ weights
        assert inside.mean() > 0.2 and np.abs(change[inside]).max() <= 0.51
        assert np.ptp(results.astype(int), axis=-1).max() > 10, "there are colours"


def test_superres_takes_a_small_picture_as_it_is_and_averages_a_large_one(edit):
    results, said = edit("superres", "small.png", "--factor", "2", "--steps", "2", "--n", "3")
    assert "small.png: taken as the small picture, 4x4" in said
    means = results.reshape(3, 4, 2, 4, 2, 3).mean((2, 4))
    inside = ((results > 0) & (results < 255)).reshape(3, 4, 2, 4, 2, 3).all((2, 4))
    assert inside.mean() > 0.2 and np.abs(means - opened("small.png"))[inside].max() <= 0.51
    _, said = edit("superres", "a.png", "--factor", "4", "--steps", "2", "--n", "1")
    assert "a.png: averaged to 2x2 first" in said


def test_stroke_starts_at_the_level_asked_for(edit):
    near, said = edit("stroke", "a.png", "--sigma", "0.01", "--steps", "1", "--n", "2")
    assert "1 network call at sigma 0.01;" in said
    assert np.abs(near.astype(int) - opened("a.png")).max() < 30
    _, said = edit("stroke", "a.png", "--n", "2")
    assert "2 network calls at sigma 5.38 to 2.24;" in said


def test_a_student_that_takes_a_weight_of_guidance_edits_at_the_one_asked_for(edit):
    found = {}
    for options in ((), ("--guidance", "2"), ("--guidance", "8")):
        found[options], said = edit("stroke", "a.png", "--n", "2", "--model", "out/weights", *options)
        assert f"guidance {'8' if '8' in options else '2'};" in said
    own, same, other = found.values()
    assert (own == same).all() and (own != other).any()


def test_denoise_is_one_call_without_randomness(edit):
    (one,), said = edit("denoise", "a.png", "--sigma", "0.2", out="one")
    (other,), _ = edit("denoise", "a.png", "--sigma", "0.2", "--seed", "9", out="other")
    np.testing.assert_array_equal(one, other)
    assert "1 image, 1 network call at sigma 0.2;" in said
    _, said = edit("denoise", "photo.jpg", "--sigma", "0.2")
    assert "resizing changes noise; --sigma speaks of the 8x8 pixels" in said
    results, _ = edit("denoise", "a.png", "--sigma", "0.2", "--steps", "2", "--n", "2", out="two")
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize("steps", ["1", "3"])
def test_interpolated_samples_end_where_cm_sample_draws(edit, tmp_path, capsys, steps):
    frames, _ = edit("interpolate", "--seeds", "4", "7", "--steps", steps, "--n", "5")
    for seed, frame in (("4", frames[0]), ("7", frames[-1])):
        run(capsys, "sample", "--seed", seed, "--steps", steps, "--n", "1", "--out", str(tmp_path / "drawn"))
        drawn = np.asarray(Image.open(tmp_path / "drawn" / "000000.png"))
        assert np.abs(drawn.astype(int) - frame).max() <= 1  # batches of another size may round differently
    assert (frames[1:] != frames[:-1]).any((1, 2, 3)).all()


def test_pictures_are_blended_from_one_to_the_other(edit):
    frames, said = edit("interpolate", "a.png", "b.png", "--sigma", "0.01", "--n", "3")
    a, b = opened("a.png").astype(int), opened("b.png").astype(int)
    for frame, expected in zip(frames, (a, (a + b) / 2, b), strict=True):
        assert np.abs(frame - expected).max() < 30
    assert "3 images, 1 network call at sigma 0.01;" in said


def test_results_do_not_depend_on_their_number(edit):
    few, _ = edit("colorize", "a.png", "--steps", "2", "--n", "2", out="few")
    many, _ = edit("colorize", "a.png", "--steps", "2", "--n", "5", out="many")
    assert np.abs(few.astype(int) - many[:2]).max() <= 1


def test_a_class_is_asked_for_by_its_number(edit):
    first, second = (
        edit("stroke", "a.png", "--model", "out/classes", "--label", label, out=label)[0] for label in ("0", "2")
    )
    assert (first != second).any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("palette.gif", ["a palette turned into colours"]),
        ("alpha.png", ["transparent pixels shown on white"]),
        ("photo.jpg", ["center-crop from 40x60 to 8x8", "turned upright"]),
        ("small.png", ["from 4x4 to 8x8", "enlarged on the way"]),
        ("a.png", []),
    ],
)
def test_what_was_done_to_a_picture_is_said(edit, name, words):
    results, said = edit("stroke", name, "--n", "1")
    assert results.shape == (1, 8, 8, 3)
    assert all(word in said for word in words) and (f"{name}: " in said) == bool(words)


def test_a_model_of_grey_images_says_that_it_drops_colours(edit):
    results, said = edit("stroke", "a.png", "--model", "out/grey", "--n", "2")
    assert results.shape == (2, 8, 8) and "its colours dropped" in said
    assert "colours" not in edit("stroke", "grey.png", "--model", "out/grey", "--n", "1", out="grey")[1]


def test_pictures_may_have_the_shape_of_a_model_that_is_no_square(edit):
    results, _ = edit("stroke", "wide.png", "--model", "out/wide", "--n", "1")
    assert results.shape == (1, 4, 8, 3)


def test_options_speak_of_what_there_is():
    assert set(RESIZES) == {*RESIZE, "none"}
    assert set(SAID) <= set(TRAITS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("inpaint", "a.png"), ["--mask"]),
        (("inpaint", "a.png", "--mask", "mask5.png"), ["mask5.png", "5x5", "8x8"]),
        (("inpaint", "photo.jpg", "--mask", "mask5.png"), ["mask5.png", "5x5", "40x60 or 8x8"]),
        (("inpaint", "a.png", "--mask", "black.png"), ["black.png", "white"]),
        (("inpaint", "nowhere.png", "--mask", "mask.png"), ["nowhere.png"]),
        (("inpaint", "text.png", "--mask", "mask.png"), ["text.png", "PNG, JPEG"]),
        (("stroke", "broken.png"), ["broken.png", "damaged"]),
        (("stroke", "photo.jpg", "--resize", "none"), ["photo.jpg", "40x60", "8x8"]),
        (("stroke", "a.png", "--model", "out/wide"), ["a.png", "8x8", "8x4"]),
        (("stroke", "a.png", "--model", "out/teacher"), ["out/teacher", "teacher", "consistency model"]),
        (("stroke", "a.png", "--model", "out/halved"), ["out/halved", "progressive distillation"]),
        (
            ("stroke", "a.png", "--model", "out/flow_map"),
            ["out/flow_map", "a student of MeanFlow", "consistency model"],
        ),
        (("stroke", "a.png", "--model", "out/generator"), ["out/generator", "one-step generator", "consistency model"]),
        (("stroke", "a.png", "--model", "out/truncated"), ["out/truncated", "not trained below sigma 1 (TCM)"]),
        (("stroke", "a.png", "--model", "nowhere"), ["nowhere", "model.json"]),
        (("stroke", "a.png", "--sigma", "90"), ["--sigma 90", "80"]),
        (("stroke", "a.png", "--sigma", "nan"), ["--sigma nan"]),
        (("stroke", "a.png", "--sigma", "0.003"), ["--sigma 0.003", "sigma_min=0.002"]),
        (("stroke", "a.png", "--label", "1"), ["--label 1", "no classes"]),
        (("stroke", "a.png", "--model", "out/classes"), ["no --label", "3 classes", "0 to 2"]),
        (("stroke", "a.png", "--model", "out/classes", "--label", "3"), ["--label 3", "0 to 2"]),
        (("colorize", "a.png", "--model", "out/grey"), ["out/grey", "1 channel", "RGB"]),
        (("superres", "a.png"), ["--factor"]),
        (("superres", "a.png", "--factor", "3"), ["--factor 3", "8x8"]),
        (("superres", "a.png", "--factor", "1"), ["--factor 1"]),
        (("denoise", "a.png"), ["--sigma"]),
        (("denoise", "a.png", "--sigma", "0.1", "--n", "2"), ["--n 2", "--steps 2"]),
        (("interpolate", "a.png"), ["two pictures", "got 1"]),
        (("interpolate", "a.png", "b.png", "--seeds", "1", "2"), ["--seeds", "neither pictures nor --sigma"]),
        (("interpolate", "--seeds", "1", "2", "--sigma", "1"), ["--seeds"]),
        (("interpolate", "--seeds", "1"), ["--seeds"]),
        (("stroke", "a.png", "--n", "0"), ["--n", "above 0"]),
        (("paint", "a.png"), ["paint", "inpaint"]),
    ],
)
def test_what_makes_no_sense_is_one_line(workspace, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(workspace)
    code, _, err = run(capsys, "edit", *argv, "--out", str(tmp_path / "never"))
    assert code == 2 and err.startswith("cm: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not (tmp_path / "never").exists()
