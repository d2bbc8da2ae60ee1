"""Files with the outputs that the code of their origin computes of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cm_core.formats.base import Hints, UnreadableCheckpoint
from cm_core.formats.convert import without_classes
from cm_core.formats.edm2 import read_network
from cm_core.formats.read import read_checkpoint
from cm_core.model import load_model, save_model
from cm_core.networks import blocks

FILES = Path(__file__).parents[2] / "fixtures" / "checkpoints"
ROUNDING = 1e-5  # of the largest output


def outputs(spec, weights, values, augment_labels=None):
    """Return what the model makes of a file's inputs, in float32 on the CPU."""
    model = spec.build().eval()
    model.load_state_dict(weights)
    labels = torch.from_numpy(values["labels"]) if "labels" in values else None
    with torch.no_grad():
        return model(torch.from_numpy(values["x"]), torch.from_numpy(values["sigma"]), labels, augment_labels)


def error(found, expected):
    expected = torch.from_numpy(expected)
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ["edm_ddpmpp_cond_augment", "edm_ncsnpp", "ect_ddpmpp", "edm2_xs_like"])
def test_a_published_format_is_right_to_rounding(name):
    found, values = read_checkpoint(FILES / f"{name}.pkl"), np.load(FILES / f"{name}.npz")
    augment = torch.from_numpy(values["augment_labels"]) if "augment_labels" in values else None
    assert error(outputs(found.spec, found.weights, values, augment), values["out"]) < ROUNDING
    if augment is not None:
        assert error(outputs(found.spec, found.weights, values), values["out_zero_augment"]) < ROUNDING
        assert error(outputs(found.spec, found.weights, values), values["out"]) > 100 * ROUNDING


def test_edm2_without_a_label_is_what_its_code_makes_of_zeros():
    found, values = read_checkpoint(FILES / "edm2_xs_like.pkl"), dict(np.load(FILES / "edm2_xs_like.npz"))
    assert (found.format, found.spec.form, found.spec.network.kind) == ("NVlabs EDM2", "denoiser", "edm2")
    none = {**values, "labels": np.full_like(values["labels"], -1)}
    assert error(outputs(found.spec, found.weights, none), values["out_unlabelled"]) < ROUNDING
    assert error(outputs(found.spec, found.weights, none), values["out"]) > 100 * ROUNDING
    with pytest.raises(UnreadableCheckpoint, match="drop_classes: EDM2's network without labels is another one"):
        without_classes(found)


def test_an_edm2_network_of_other_constants_is_refused():
    arguments = {"img_resolution": 16, "img_channels": 3, "label_dim": 10}
    for changes, reason in [
        ({"res_balance": 0.5}, r"res_balance=0\.5 is not supported; read are \[0\.3\]"),
        ({"channel_mult_emb": 3}, r"channel_mult_emb=3 is not supported"),
        ({"depth": 2}, "its EDM2 network has the argument 'depth'"),
    ]:
        with pytest.raises(UnreadableCheckpoint, match=reason):
            read_network(arguments | changes)


def test_what_the_file_is_comes_from_the_file():
    found = read_checkpoint(FILES / "edm_ddpmpp_cond_augment.pkl")
    spec = found.spec
    assert (found.format, found.licence) == ("NVlabs EDM", "CC BY-NC-SA 4.0")
    assert (spec.form, spec.image_shape, spec.num_classes, spec.augment_dim) == ("denoiser", (3, 16, 16), 10, 9)
    assert (spec.network.kind, spec.network.channel_mult, spec.network.dropout) == ("song_unet", (1, 2), 0.1)
    assert read_checkpoint(FILES / "edm_ncsnpp.pkl").spec.network.encoder == "residual"


def test_ect_has_two_forms_and_the_one_of_its_evaluation_is_the_default(monkeypatch):
    """Its code leaves the shift out in training mode alone, where it drops activations too.

    The reference drew its masks from the generator as the seeded initialisation had left it: one number for every
    weight and bias, none for those of norms. With those masks the other form is right to rounding as well.
    """
    path, values = FILES / "ect_ddpmpp.pkl", np.load(FILES / "ect_ddpmpp.npz")
    shifted, unshifted = read_checkpoint(path), read_checkpoint(path, Hints(form="unshifted"))
    assert (shifted.spec.form, shifted.spec.boundary) == ("skip", 0.003)
    assert (unshifted.spec.form, unshifted.spec.boundary) == ("unshifted", 0.0)
    x, sigma = torch.from_numpy(values["x"]), torch.from_numpy(values["sigma"])
    model = unshifted.spec.build().train()
    model.load_state_dict(unshifted.weights)
    monkeypatch.setattr(blocks, "dropout", lambda h, p, *, layer: torch.nn.functional.dropout(h.contiguous(), p))
    drawn = sum(tensor.numel() for name, tensor in model.named_parameters() if "norm" not in name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        torch.rand(drawn)
        assert error(model(x, sigma), values["out_train_form"]) < ROUNDING
        assert error(model(x, sigma), values["out_train_form"]) > 1000 * ROUNDING, "the next masks are others"
    with pytest.raises(UnreadableCheckpoint, match=r"ect_ddpmpp\.pkl: ECMPrecond is of form skip or unshifted, and"):
        read_checkpoint(path, Hints(form="denoiser"))


def test_an_imported_model_is_saved_and_read_again(tmp_path):
    found = read_checkpoint(FILES / "edm_ncsnpp.pkl")
    save_model(tmp_path, found.spec, found.weights)
    spec, model = load_model(tmp_path)
    assert spec == found.spec
    again = read_checkpoint(tmp_path)
    assert again.spec == spec and all(torch.equal(again.weights[name], one) for name, one in model.state_dict().items())


def test_a_model_without_its_classes_computes_what_it_computed_for_no_label():
    conditional, values = (
        read_checkpoint(FILES / "edm_ddpmpp_cond_augment.pkl"),
        dict(np.load(FILES / "edm_ddpmpp_cond_augment.npz")),
    )
    del values["labels"]
    free = without_classes(conditional)
    assert free.spec.num_classes == 0 and conditional.spec.num_classes == 10
    unlabelled = outputs(conditional.spec, conditional.weights, values)
    assert error(outputs(free.spec, free.weights, values), unlabelled.numpy()) < ROUNDING
