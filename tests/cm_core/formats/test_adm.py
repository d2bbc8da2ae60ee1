"""ADM in the three formats that have it, against the UNet2DModel and the schedulers of diffusers."""

import json

import pytest
import torch

from cm_core.formats.base import Hints, UnreadableCheckpoint
from cm_core.formats.read import read_checkpoint
from cm_core.metrics.torchvision_shim import ensure_torchvision
from foreign_checkpoints import adm_pickle, make_unet, to_openai

ensure_torchvision()
diffusers = pytest.importorskip("diffusers")
ROUNDING = 1e-5  # of the largest output
SIGMAS = (0.002, 0.1, 1.0, 10.0, 80.0)


@torch.no_grad()
def largest_error(found, unet, scheduler, labels=None):
    """Return the largest relative difference between a model and what diffusers makes of a network and a scheduler."""
    model = found.spec.build().eval()
    model.load_state_dict(found.weights)
    noise, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), labels
    if unet.config.num_class_embeds:
        labels = torch.arange(4)
    errors = []
    for level in SIGMAS:
        sigma, x = torch.full((4,), level), noise * level
        if hasattr(scheduler, "precondition_outputs"):
            raw = unet(
                scheduler.precondition_inputs(x, sigma[0]), scheduler.precondition_noise(sigma[0]), labels
            ).sample
            expected = scheduler.precondition_outputs(x, raw, sigma[0])
        else:
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma[0])
            timestep = torch.tensor(scheduler.sigma_to_t(sigma[:1].numpy())[0])
            expected = c_out * unet(x / (sigma[0] ** 2 + 0.25).sqrt(), timestep, labels).sample + c_skip * x
        errors.append(((model(x, sigma, labels) - expected).abs().max() / expected.abs().max()).item())
    return max(errors)


CONFIGURATIONS = {
    "imagenet": {},
    "lsun": {"shift": "default", "classes": None},
    "deep": {"widths": (32, 32, 64), "attends": (False, True, True), "layers": 2},
    "narrow": {"head": 8, "groups": 8},
    "wide": {"widths": (128, 256), "head": 64},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("scheduler", ["CMStochasticIterativeScheduler", "EDMEulerScheduler"])
def test_a_folder_of_diffusers_is_right_to_rounding(name, scheduler, tmp_path):
    unet, scheduler = make_unet(**CONFIGURATIONS[name]), getattr(diffusers, scheduler)()
    unet.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    for path in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"):
        assert largest_error(read_checkpoint(path), unet, scheduler) < ROUNDING


def test_an_old_folder_of_diffusers_is_right_to_rounding(tmp_path):
    """Weights by torch.save, attention in the names that diffusers gave it before 0.15."""
    unet, scheduler = make_unet(), diffusers.CMStochasticIterativeScheduler()
    unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    scheduler.save_pretrained(tmp_path / "scheduler")
    path = tmp_path / "unet" / "diffusion_pytorch_model.bin"
    assert largest_error(read_checkpoint(path), unet, scheduler) < ROUNDING
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in torch.load(path).items():
        for new, former in names.items():
            name = name.replace(f".{new}.", f".{former}.")
        old[name] = tensor
    assert any(".proj_attn." in name for name in old)
    torch.save(old, path)
    assert largest_error(read_checkpoint(tmp_path), unet, scheduler) < ROUNDING


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"freq_shift": 1}, "freq_shift=1 is not supported"),
        ({"attn_norm_num_groups": None}, "norm_groups of the middle=None is not supported"),
        ({"downsample_type": "conv"}, "downsample_type='conv' is not supported"),
        ({"_class_name": "UNet2DConditionModel"}, "its network is UNet2DConditionModel"),
        ({"layers_per_block": 2}, "its weights lack down_blocks.0.resnets.1.norm1.weight"),
        ({"num_class_embeds": None}, "its weights have class_embedding.weight"),
    ],
)
def test_another_network_of_diffusers_is_refused(change, reason, tmp_path):
    make_unet().save_pretrained(tmp_path / "unet")
    diffusers.CMStochasticIterativeScheduler().save_pretrained(tmp_path / "scheduler")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UnreadableCheckpoint, match=reason):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["imagenet", "lsun", "deep"])
def test_a_state_dict_of_openai_is_right_to_rounding(name, tmp_path):
    unet, path = make_unet(**CONFIGURATIONS[name]), tmp_path / "cd.pt"
    torch.save(to_openai(unet), path)
    scheduler = diffusers.CMStochasticIterativeScheduler()
    found = read_checkpoint(path, Hints("skip", resolution=16, channels_per_head=32))
    assert largest_error(found, unet, scheduler) < ROUNDING
    with pytest.raises(UnreadableCheckpoint, match=r"cd\.pt: a state dict .* does not say what it is"):
        read_checkpoint(path, Hints(resolution=16))
    with pytest.raises(UnreadableCheckpoint, match=r"cd\.pt: its widths .* give the resolution"):
        read_checkpoint(path, Hints("skip"))


def test_a_pickle_of_edm_with_adm_is_right_to_rounding(tmp_path):
    """EDM has fewer groups below 128 channels, so this network is as wide."""
    unet, path = make_unet((128, 256), head=64), tmp_path / "edm.pkl"
    path.write_bytes(adm_pickle(unet))
    found = read_checkpoint(path)
    assert largest_error(found, unet, diffusers.EDMEulerScheduler()) < ROUNDING
    for name, what in {"VPPrecond": "VP", "VEPrecond": "VE", "iDDPMPrecond": "iDDPM"}.items():
        path.write_bytes(adm_pickle(unet, class_name=name))
        with pytest.raises(UnreadableCheckpoint, match=rf"edm\.pkl: {what} preconditioning \({name}\)"):
            read_checkpoint(path)
