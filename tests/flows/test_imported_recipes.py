"""The recipes of published checkpoints, run to their ends with small files in the same formats and small numbers."""

import json

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from cm_core.metrics.torchvision_shim import ensure_torchvision
from flows.storage.digests import file_digest
from foreign_checkpoints import adm_pickle, make_unet, to_openai
from live import cm, make_live_workspace
from miniature import REPOSITORY

pytestmark = pytest.mark.slow

FIXTURES = REPOSITORY / "tests" / "fixtures" / "checkpoints"
ADM = "kind: dhariwal_unet, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [8]"
SMALL = [
    "data.resolution=16",
    "features={kind: classifier, num_steps: 20, batch_size: 32}",
    *("sample.num_images=16", "sample.teacher_images=8", "sample.batch_size=8", "sample.precision=fp32"),
    *("sample.teacher_sampler.num_steps=2", "edit.num_images=3", "edit.num_steps=2"),
    *(f"student.train.{key}={value}" for key, value in {"num_steps": 4, "batch_size": 8, "precision": "fp32"}.items()),
    *(f"student.train.{key}=2" for key in ("log_every", "save_every", "grid_every")),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace with images of ten classes beside it."""
    root = make_live_workspace(tmp_path_factory.mktemp("live") / "workspace")
    generator = np.random.default_rng(0)
    for index in range(64):
        path = root.parent / "images" / f"class{index % 10}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    return root


def ect_1hour(folder):
    network = "network={kind: song_unet, channels: 16, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [8]}"
    return FIXTURES / "edm_ddpmpp_cond_augment.pkl", [network, "teacher.drop_classes=true", "data.channels=rgb"]


def openai_cd(folder):
    torch.save(to_openai(make_unet()), folder / "cd.pt")
    return folder / "cd.pt", [f"network={{{ADM}, channels: 32, channels_per_head: 32, norm_groups: 32}}"]


def folder_64_tune(folder):
    (folder / "adm.pkl").write_bytes(adm_pickle(make_unet((128, 256), head=64)))
    return folder / "adm.pkl", [f"network={{{ADM}, channels: 128, channels_per_head: 64}}", "conditional=false"]


@pytest.mark.parametrize(
    ("name", "make", "role", "about"),
    [
        ("cifar10-ect-1hour", ect_1hour, "teacher", ("NVlabs EDM", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0")),
        ("imagenet64-openai-cd", openai_cd, "student", ("OpenAI consistency models", "MIT", "mit")),
        ("folder-64-tune", folder_64_tune, "teacher", ("NVlabs EDM", "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0")),
    ],
)
def test_a_recipe_of_a_published_checkpoint_runs_to_its_end(root, name, make, role, about):
    ensure_torchvision()
    pytest.importorskip("diffusers")
    weights, own = make(root.parent)
    source = "{kind: images, path: %s, name: small, licence: made up}" % (root.parent / "images")
    values = [f"data.source={source}", f"{role}.weights={weights}", *SMALL, *own]
    recipe = (str(REPOSITORY / "params" / "recipes" / f"{name}.yaml"), *(f"--set={value}" for value in values))
    plan = cm(root, "plan", *recipe, "--gpu", "h100", "--json")
    trainings = {training["training"]: training for training in json.loads(plan.stdout)["trainings"]}
    assert trainings[role]["hours"] == 0 and trainings[role]["advice"] == "imported, not trained: costs nothing"
    done = cm(root, "run", *recipe)
    assert done.returncode == 0, done.stderr[-3000:]

    format_name, licence, hub_licence = about
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    run = client.search_runs(experiments, f"tags.stage = '{role}' and tags.recipe LIKE '{name}%'")[0]
    tags = {key.removeprefix("import."): run.data.tags[key] for key in run.data.tags if key.startswith("import.")}
    sha256 = file_digest(weights)
    assert tags == {"weights": str(weights), "sha256": sha256, "format": format_name, "licence": licence}

    version = max(client.search_model_versions("name = 'cm-small'"), key=lambda found: int(found.version))
    assert version.tags["recipe"].startswith(name)
    imported = f"The {role} was imported, not trained: {format_name}, SHA-256 `{sha256}`, licence {licence}."
    assert imported in version.description and "![Samples](ajax-api/" in version.description
    card = root.parent / f"hub-{name}"
    exported = cm(root, "export", f"models:/cm-small/{version.version}", "--to", "hub", "--out", str(card))
    assert exported.returncode == 0, exported.stderr
    assert f"license: {hub_licence}\n" in (card / "README.md").read_text()
    assert {path.name for path in card.iterdir()} >= {"README.md", "model.safetensors", "samples.png", "recipe.yaml"}
    assert (card / "model_index.json").exists() == (name != "cifar10-ect-1hour"), "diffusers has ADM alone"
