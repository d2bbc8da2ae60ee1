"""A teacher or student read from a checkpoint in place of a training, as stages call it."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from cm_core.formats.read import read_checkpoint
from cm_core.model import load_model
from flows.errors import UserError
from flows.recipes.recipe import load_recipe
from flows.storage.digests import file_digest
from servers import http_server, make_certificate, s3_server
from small_stages import ROOT, TRAIN, run_small

FILES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
NETWORK = "network={kind: song_unet, channels: 16, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [8]}"
SMALL = [
    NETWORK,
    "teacher.weights=null",
    "features=classifier",
    "data={heldout_fraction: 0.25}",
    *("sample={num_images: 6, batch_size: 4, teacher_images: 6, mid_sigmas: [[], [0.821]]}", "edit.num_images=3"),
    *("sample.teacher_sampler.num_steps=2", "edit.num_steps=2"),
    *(f"student.train.{key}={value}" for key, value in TRAIN.items()),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder in which 16x16 colour images of ten classes are prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    images = np.random.default_rng(0).integers(0, 256, (48, 16, 16, 3), np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(48) % 10)
    run_small("prepare", recipe_for(folder), folder)
    return folder


def recipe_for(folder, *overrides):
    source = f"data.source={{kind: array, path: {folder / 'images.npz'}}}"
    return load_recipe("cifar10-ect", [*SMALL, source, *overrides], root=ROOT)


def imported(prepared, tmp_path, stage, *overrides):
    recipe = recipe_for(prepared, *overrides)
    return run_small(stage, recipe, tmp_path, prepare_dir=prepared / "prepare")


def test_an_imported_teacher_is_an_artifact_like_a_trained_one(prepared, tmp_path):
    path = FILES / "edm_ncsnpp.pkl"
    ncsnpp = "network={kind: song_unet, channels: 16, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [8], "
    ncsnpp += "fourier_scale: 16, encoder: residual, resample_filter: fir, dropout: 0.3}"
    folder = imported(prepared, tmp_path, "teacher", f"teacher.weights={path}", ncsnpp)
    assert sorted(file.name for file in folder.iterdir()) == ["ema.safetensors", "model.json", "origin.json"]
    spec, model = load_model(folder)
    assert spec.network.dropout == 0.3, "the recipe's: sampling ignores it"
    weights = read_checkpoint(path).weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    origin = json.loads((folder / "origin.json").read_text())
    assert origin == {
        "sha256": file_digest(path),
        "format": "NVlabs EDM",
        "licence": "CC BY-NC-SA 4.0",
    }


def test_a_student_is_tuned_from_an_imported_teacher(prepared, tmp_path):
    weights = f"teacher.weights={FILES / 'edm_ddpmpp_cond_augment.pkl'}"
    overrides = ("conditional=true", weights, "student.train.num_steps=2")
    imported(prepared, tmp_path, "teacher", *overrides)
    folder = imported(prepared, tmp_path, "student", *overrides)
    (teacher, _), (student, model) = load_model(tmp_path / "teacher"), load_model(folder)
    assert (teacher.form, student.form) == ("denoiser", "unshifted")
    assert teacher.augment_dim == student.augment_dim == 9 and student.num_classes == 10
    first = read_checkpoint(FILES / "edm_ddpmpp_cond_augment.pkl").weights["net.unet.input.weight"]
    moved = (model.net.unet.input.weight - first).abs().max()
    assert 0 < moved < 1e-3
    run_small("sample", recipe_for(prepared, *overrides), tmp_path, prepare_dir=prepared / "prepare")
    rows = json.loads((tmp_path / "sample" / "samples.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"nfe_1", "nfe_2", "untrained", "teacher_nfe_3"}


def test_an_imported_student_is_drawn_and_edited_without_a_teacher(prepared, tmp_path):
    overrides = ("teacher=null", f"student.weights={FILES / 'ect_ddpmpp.pkl'}")
    recipe = recipe_for(prepared, *overrides)
    for stage in ("teacher", "student", "sample", "edit"):
        run_small(stage, recipe, tmp_path, prepare_dir=prepared / "prepare")
    assert json.loads((tmp_path / "student" / "origin.json").read_text())["format"] == "locuslab ECT"
    rows = json.loads((tmp_path / "sample" / "samples.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["nfe_1", "nfe_2"], "no row before a training that there was not"


def test_classes_are_dropped_only_when_asked(prepared, tmp_path):
    weights = f"teacher.weights={FILES / 'edm_ddpmpp_cond_augment.pkl'}"
    with pytest.raises(UserError, match=r"teacher\.weights: num_classes is 10 in the file and 0 in the recipe"):
        imported(prepared, tmp_path, "teacher", weights)
    folder = imported(prepared, tmp_path, "teacher", weights, "teacher.drop_classes=true")
    assert load_model(folder)[0].num_classes == 0


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["network.channels=8"], "network.channels is 16 in the file and 8 in the recipe"),
        (
            ["network={kind: dhariwal_unet, channels: 32}"],
            "network.kind is 'song_unet' in the file and 'dhariwal_unet'",
        ),
        (["noise.sigma_data=1"], "noise.sigma_data is 0.5 in the file and 1.0 in the recipe"),
        ([f"teacher.sha256={'a' * 64}"], "sha256 is "),
        ([f"teacher.weights={FILES / 'ect_ddpmpp.pkl'}"], "ECMPrecond is of form skip or unshifted, and form denoiser"),
        (["teacher.weights=gone.pkl"], "gone.pkl: no such file"),
        (["teacher.weights=models:/cm-digits@champion"], "`cm import models:/cm-digits@champion` makes a folder"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(prepared, tmp_path, overrides, reason):
    weights = [f"teacher.weights={FILES / 'edm_ddpmpp_cond_augment.pkl'}", "teacher.drop_classes=true"]
    with pytest.raises(UserError) as refused:
        imported(prepared, tmp_path, "teacher", *weights, *overrides)
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "teacher" / "model.json").exists()


@pytest.mark.parametrize("scheme", ["file", "https", "s3"])
def test_a_recipe_reads_weights_from_an_address(prepared, tmp_path, monkeypatch, scheme):
    path = FILES / "edm_ddpmpp_cond_augment.pkl"
    with ExitStack() as servers:
        if scheme == "https":
            certificate = make_certificate(tmp_path / "certificate.pem")
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            url, _ = servers.enter_context(http_server({"/teacher.pkl": (200, {}, path.read_bytes())}, certificate))
            address = f"{url}/teacher.pkl"
        elif scheme == "s3":
            servers.enter_context(s3_server(monkeypatch, "models")).upload_file(str(path), "models", "teacher.pkl")
            address = "s3://models/teacher.pkl"
        else:
            address = path.as_uri()
        given = [f"teacher.weights={address}", "conditional=true"]
        with pytest.raises(UserError, match=f"sha256 is {file_digest(path)}"):
            imported(prepared, tmp_path / "other", "teacher", *given, f"teacher.sha256={'a' * 64}")
        folder = imported(prepared, tmp_path, "teacher", *given, f"teacher.sha256={file_digest(path)}")
    assert json.loads((folder / "origin.json").read_text())["sha256"] == file_digest(path)
    assert torch.equal(
        load_model(folder)[1].state_dict()["net.unet.input.weight"],
        read_checkpoint(path).weights["net.unet.input.weight"],
    )


def test_a_folder_has_the_checksum_of_its_files(prepared, tmp_path):
    folder = tmp_path / "copy"
    imported(
        prepared, tmp_path, "teacher", f"teacher.weights={FILES / 'edm_ddpmpp_cond_augment.pkl'}", "conditional=true"
    )
    shutil.copytree(tmp_path / "teacher", folder)
    again = [f"teacher.weights={folder}", "conditional=true"]
    made = imported(prepared, tmp_path / "again", "teacher", *again)
    sha256 = json.loads((made / "origin.json").read_text())["sha256"]
    assert load_model(made)[0] == load_model(folder)[0]
    imported(prepared, tmp_path / "checked", "teacher", *again, f"teacher.sha256={sha256}")
    (folder / "model.json").write_text((folder / "model.json").read_text() + " ")
    with pytest.raises(UserError, match="sha256 of its files is"):
        imported(prepared, tmp_path / "changed", "teacher", *again, f"teacher.sha256={sha256}")


def test_a_recipe_holds_the_checksum_of_a_local_file(prepared, tmp_path):
    """A cache that knew the path alone would return the model of a file that has changed."""
    path = tmp_path / "teacher.pkl"
    overrides = [*SMALL, "teacher.weights=teacher.pkl"]
    for content in (b"one", b"two"):
        path.write_bytes(content)
        recipe = load_recipe("cifar10-ect", overrides, root=ROOT, base=tmp_path)
        assert (recipe.teacher.weights, recipe.teacher.sha256) == (str(path), file_digest(path))
    given = load_recipe("cifar10-ect", [*overrides, f"teacher.sha256={'a' * 64}"], root=ROOT, base=tmp_path)
    assert given.teacher.sha256 == "a" * 64
