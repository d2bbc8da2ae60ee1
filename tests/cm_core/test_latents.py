"""Latents: encoded and decoded as diffusers does, and one line for an autoencoder that cannot be used."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cm_core import latents as module
from cm_core.latents import (
    CONFIG_FILE,
    DECODER_FILE,
    WEIGHTS_FILE,
    Latents,
    encode,
    latent_shape,
    load_autoencoder,
    load_decoder,
    read_config,
    write_decoder,
)
from cm_core.metrics.torchvision_shim import ensure_torchvision
from cm_core.tensors import from_pixels, to_inputs, to_pixels
from small_autoencoder import save_autoencoder

ensure_torchvision()
diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("latents") / "vae", channels=3)


@pytest.fixture
def own(folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folder, tmp_path / "vae")


def write(folder, **other):
    """Write a decoder and return it with what model.json says of it."""
    sha256 = write_decoder(load_autoencoder(folder, CPU), folder / DECODER_FILE)
    found = {"decoder": sha256, "pixel_shape": (3, 8, 8), "mean": (0.5, -1.0), "std": (2.0, 0.25)}
    return Latents(**(found | other))


def test_encoding_and_decoding_are_those_of_diffusers(own):
    theirs = diffusers.AutoencoderKL.from_pretrained(str(own), low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        posterior = theirs.encode(from_pixels(torch.from_numpy(PIXELS))).latent_dist
    found = encode(load_autoencoder(own, CPU), PIXELS, CPU)
    torch.testing.assert_close(found, torch.stack([posterior.mean, posterior.std], 1), rtol=1e-5, atol=1e-6)
    latents = write(own)
    mean, std = torch.tensor([0.5, -1.0]).view(-1, 1, 1), torch.tensor([2.0, 0.25]).view(-1, 1, 1)
    x = (posterior.mean - mean) / std * 0.5
    with torch.no_grad():
        expected = to_pixels(theirs.decode(posterior.mean).sample)
    decoded = load_decoder(own, latents, CPU)(x)
    assert decoded.shape == (5, 8, 8, 3) and decoded.dtype == torch.uint8
    assert (decoded.int() - expected.int()).abs().max() <= 1, "z is rounded by its way through x"
    assert decoded.float().std() > 1, "an autoencoder that says something"


def test_a_batch_is_decoded_in_parts(own, monkeypatch):
    latents, x = write(own), torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, sizes = load_decoder(own, latents, CPU)(x), []
    monkeypatch.setattr(module, "AT_ONCE", 3 * 64)
    module._open_decoder.cache_clear()
    monkeypatch.setattr(module, "to_pixels", lambda image: sizes.append(len(image)) or to_pixels(image))
    parts = load_decoder(own, latents, CPU)(x)
    assert sizes == [3, 3, 1] and (whole.int() - parts.int()).abs().max() <= 1


def test_the_decoder_holds_neither_the_encoder_nor_a_path_of_this_machine(own):
    write(own)
    assert {name.partition(".")[0] for name in load_file(own / DECODER_FILE)} == {"decoder", "post_quant_conv"}
    assert str(own).encode() not in (own / DECODER_FILE).read_bytes()


def test_drawn_latents_have_the_posteriors_mean_and_deviation():
    mean, std = torch.full((1, 40_000, 1, 1), 3.0), torch.full((1, 40_000, 1, 1), 0.5)
    stored = torch.stack([mean, std], 1)
    drawn = to_inputs(stored, torch.Generator().manual_seed(0))
    assert drawn.shape == mean.shape
    assert abs(drawn.mean() - 3) < 0.01 and abs(drawn.std() - 0.5) < 0.01
    assert torch.equal(to_inputs(stored), mean)
    pixels = torch.from_numpy(PIXELS)
    assert torch.equal(to_inputs(pixels, torch.Generator()), from_pixels(pixels))


def test_shapes(folder):
    config = read_config(folder)
    assert latent_shape(config, (3, 8, 12)) == (2, 4, 6)
    with pytest.raises(ValueError, match="divides each side by 2, and images of 9x8 pixels do not .* multiple of 2"):
        latent_shape(config, (3, 8, 9))
    with pytest.raises(ValueError, match="images of 3 channels, these have 1; set data.channels=rgb"):
        latent_shape(config, (1, 8, 8))


@pytest.mark.parametrize(
    "change, part",
    [
        ({"_class_name": "VQModel"}, "describes VQModel; allowed is AutoencoderKL"),
        ({"out_channels": 1}, "in_channels=3, out_channels=1; allowed: 1 or 3"),
        ({"block_out_channels": []}, r"block_out_channels=\[\]"),
        ({"latent_channels": "2"}, "latent_channels='2'; positive whole numbers"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "not a whole AutoencoderKL|alone"),
        ({"latent_channels": 3}, "not a whole AutoencoderKL"),
    ],
)
def test_other_configurations_are_refused(own, change, part):
    config = json.loads((own / CONFIG_FILE).read_text())
    (own / CONFIG_FILE).write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=part) as refused:
        load_autoencoder(own, CPU)
    assert "\n" not in str(refused.value)


def test_files_that_are_missing_or_damaged_are_named(own):
    (own.parent / "pipeline").mkdir()
    shutil.copytree(own, own.parent / "pipeline" / "vae")
    with pytest.raises(ValueError, match="holds no config.json of an AutoencoderKL; its folder vae/ does: name .*/vae"):
        read_config(own.parent / "pipeline")
    weights = load_file(own / WEIGHTS_FILE)
    name = next(iter(weights))
    save_file({other: tensor for other, tensor in weights.items() if other != name}, own / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=f"weights and config.json differ: {name} is in the network alone"):
        load_autoencoder(own, CPU)
    save_file(weights | {"odd": torch.zeros(1)}, own / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="differ: odd is in the file alone"):
        load_autoencoder(own, CPU)
    (own / WEIGHTS_FILE).write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a whole AutoencoderKL"):
        load_autoencoder(own, CPU)
    (own / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match="config.json: not readable as JSON"):
        read_config(own)


def test_pickled_weights_are_not_read(own):
    torch.save(load_file(own / WEIGHTS_FILE), own / "diffusion_pytorch_model.bin")
    (own / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match="read from safetensors alone, not from pickles"):
        load_autoencoder(own, CPU)


def test_another_decoder_or_none_is_refused(own, tmp_path):
    latents = write(own)
    with pytest.raises(ValueError, match="is not the decoder that the model was trained with"):
        load_decoder(own, latents.model_copy(update={"decoder": "0" * 64}), CPU)
    with pytest.raises(FileNotFoundError, match="its model makes latents, and decoder.safetensors, .* is missing"):
        load_decoder(tmp_path / "elsewhere", latents, CPU)
    (own / "ema1").mkdir()
    load_decoder(own / "ema1", latents, CPU)  # that of the folder above


def test_without_diffusers_the_package_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package diffusers \(the extra latents\): pip install diffusers"):
        module.autoencoder_class()
