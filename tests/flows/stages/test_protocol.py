"""protocol.json: the inputs of an evaluation, each as its own stage wrote it."""

import inspect
import json

import numpy as np
import pytest
import torch

from cm_core.metrics.features import NETWORKS, register_extractors
from cm_core.model import SPEC_FILE
from evaluation_artifacts import make_artifacts, run_evaluate
from flows.data.dataset import load_dataset
from flows.reports.rows import Row
from flows.stages import evaluate, models
from flows.stages.evaluate import _data, _rule

STUDENT, TEACHER = {"kind": "constant", "decay": 0.993}, {"kind": "constant", "decay": 0.994}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The artifacts of all stages, `out` being the evaluation's."""
    root = make_artifacts(tmp_path_factory.mktemp("artifacts"))
    run_evaluate(root, root / "out")
    return root


@pytest.fixture(scope="module")
def protocol(folder):
    return json.loads((folder / "out" / "protocol.json").read_text())


def test_the_files_of_a_model_have_the_names_that_trainings_give_them():
    assert (evaluate.SPEC_FILE, evaluate.EMAS_FILE) == (SPEC_FILE, models.EMAS_FILE)


def test_data(folder, protocol):
    dataset = json.loads((folder / "prepare" / "dataset.json").read_text())
    assert protocol["data"] == {
        "name": "digits",
        "sha256": dataset["sha256"]["train"],
        "images": len(np.load(folder / "prepare" / "train_images.npy")),
        "image_shape": [1, 8, 8],
        "resize": "center-crop",
        "classes": 10,
        "conditional": False,
    }
    assert _data(load_dataset(folder / "prepare"), {"num_classes": 10})["conditional"]


def test_noise_is_that_of_the_student(folder, protocol):
    spec = json.loads((folder / "student" / "model.json").read_text())
    assert protocol["noise"] == spec["noise"] == {"sigma_min": 0.002, "sigma_max": 70.0, "rho": 6.0, "sigma_data": 0.5}


def test_each_row_has_the_rule_of_its_average(protocol):
    rules = {name: row["ema_rule"] for name, row in protocol["rows"].items()}
    averaged = {"nfe_2": STUDENT, "nfe_1": STUDENT, "teacher_nfe_35": TEACHER}
    assert rules == {"real": None, "untrained": None, **averaged}


@pytest.mark.parametrize(
    ("model", "ema", "width", "rule"),
    [
        ("student", 1, None, {"kind": "half_life"}),
        ("student", 0, 0.08, {"kind": "power", "width": 0.08}),
        ("teacher", 0, None, None),  # imported: nobody knows
    ],
)
def test_a_rebuilt_average_has_its_width_and_an_imported_model_no_rule(model, ema, width, rule):
    row = Row("x", model, ema, 1, (), np.zeros((4, 2, 2, 1), np.uint8), metrics={}, width=width)
    assert _rule(row, {"student": [{"kind": "constant"}, {"kind": "half_life"}], "teacher": []}) == rule


def test_software_and_feature_network(protocol):
    assert protocol["torch"] == torch.__version__
    assert (protocol["network"]["layer"], protocol["network"]["resize"]) == ("features", "none")


def test_the_resize_of_each_network_is_the_one_that_it_makes():
    register_extractors()  # lets torch-fidelity be imported without torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

    for name, network in (("inception-v3-compat", FeatureExtractorInceptionV3), ("vgg16", FeatureExtractorVGG16)):
        assert NETWORKS[name].resize == f"bilinear, TensorFlow 1's, to {network.INPUT_IMAGE_SIZE} pixels"
        assert "interpolate_bilinear_2d_like_tensorflow1x(" in inspect.getsource(network.forward)
    assert NETWORKS["dinov2_vitl14"].resize == "bicubic, Pillow's, to 224 pixels"


def test_the_page_shows_them(folder, protocol):
    page = (folder / "out" / "report.html").read_text()
    for words in (
        "60 of digits, 8 × 8 by center-crop, 10 classes, not told to the model",
        protocol["data"]["sha256"],
        "sigma_min 0.002, sigma_max 70.0, rho 6.0",
        "nfe_1: constant, decay 0.993",
        "features of layer features, resize none",
        f"torch {torch.__version__}",
    ):
        assert words in page
