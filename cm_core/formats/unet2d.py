"""Folders of diffusers: a UNet2DModel that resamples inside its blocks (ADM), and its scheduler."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cm_core.checkpoint import load_tensors, save_tensors
from cm_core.formats.base import (
    Checkpoint,
    Hints,
    UnreadableCheckpoint,
    adopt,
    build_spec,
    choose_form,
    needed_norm_groups,
    only,
    refuse_larger,
)
from cm_core.formats.pickles import load_torch
from cm_core.model import Form, ModelSpec
from cm_core.networks import DhariwalUNetParams

NAME, LICENCE = "diffusers UNet2DModel", "not in the file; see its model card"
CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
CONSISTENCY = "CMStochasticIterativeScheduler"
EULER, TEACHER_STEPS = "EDMEulerScheduler", 18
NO_SHIFT = 1e-3  # sigma_min / sigma_max, by which scalings shifted by sigma_min differ at sigma_max from EDM's
SCHEDULERS: dict[str, tuple[tuple[Form, ...], float]] = {  # what it takes the network for: forms, noise_scale
    CONSISTENCY: (("skip",), 1000.0),
    EULER: (("denoiser", "unshifted", "skip"), 1.0),  # one Euler step to 0 is the denoiser itself
    "EDMDPMSolverMultistepScheduler": (("denoiser",), 1.0),
}
DOWN, UP = ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), ("ResnetUpsampleBlock2D", "AttnUpBlock2D")  # no, attention
FIXED: dict[str, Any] = {  # settings of UNet2DModel under which it is our network; these are its defaults, but for ...
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "add_attention": True,
    "class_embed_type": None,
    "time_embedding_dim": None,
}
RESAMPLING = {"downsample_type": "resnet", "upsample_type": "resnet"}  # ... these, "conv" by default
DEFAULTS = {  # of the other settings
    "in_channels": 3,
    "layers_per_block": 2,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
}
SHIFTS = {"default": False, "scale_shift": True}
PARTS = {
    **{"embed.layer0": "time_embedding.linear_1", "embed.layer1": "time_embedding.linear_2"},
    **{"embed.label": "class_embedding", "unet.input": "conv_in"},
    **{"unet.output_norm": "conv_norm_out", "unet.output": "conv_out"},
}
BLOCK_PARTS = {
    **{"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"},
    **{"skip": "conv_shortcut", "attention.norm": "group_norm", "attention.proj": "to_out.0"},
}
QKV = ("to_q", "to_k", "to_v")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


def read_diffusers(path: Path, hints: Hints) -> Checkpoint:
    """Read a pipeline's folder, its folder `unet`, or the file of weights in it, config and scheduler beside it.

    Raises UnreadableCheckpoint for another network, scheduler, or a missing file.
    """
    unet = path.parent if path.is_file() else path / "unet" if (path / "unet").is_dir() else path
    config = _read_config(unet / CONFIG)
    scheduler = next(
        (one for one in (unet / SCHEDULER, unet.parent / "scheduler" / SCHEDULER) if one.is_file()),
        unet.parent / "scheduler" / SCHEDULER,
    )
    spec = read_spec(config, _read_config(scheduler), hints)
    weights = path if path.is_file() else next((unet / name for name in WEIGHTS if (unet / name).is_file()), None)
    if weights is None:
        raise UnreadableCheckpoint(f"{unet.name} holds none of {', '.join(WEIGHTS)}")
    return Checkpoint(NAME, LICENCE, spec, _convert(_read_tensors(weights), spec), "three layers")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnreadableCheckpoint(f"{path.parent.name}/{path.name} is missing or no JSON") from error
    if not isinstance(config, dict):
        raise UnreadableCheckpoint(f"{path.parent.name}/{path.name} is no JSON object")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        return load_torch(path, dict, mmap=True)
    try:
        return load_tensors(path)
    except (SafetensorError, OSError) as error:
        raise UnreadableCheckpoint(f"{path.name} is no whole safetensors file") from error


def read_spec(config: Mapping[str, Any], scheduler: Mapping[str, Any], hints: Hints) -> ModelSpec:
    """Return the model that a UNet2DModel and a scheduler make, from their configurations."""
    for key, section, known in (("network", config, ["UNet2DModel"]), ("scheduler", scheduler, list(SCHEDULERS))):
        if section.get("_class_name") not in known:
            raise UnreadableCheckpoint(f"its {key} is {section.get('_class_name')}; read are {', '.join(known)}")
    forms, noise_scale = SCHEDULERS[scheduler["_class_name"]]
    only({"prediction_type": "epsilon", **scheduler}, prediction_type=["epsilon"])
    config = {**FIXED, **RESAMPLING, **DEFAULTS, **dict.fromkeys(RESAMPLING, "conv"), **config}
    width, *_ = widths = config["block_out_channels"]
    downs, ups = config["down_block_types"], config["up_block_types"]
    groups, shift = config["norm_num_groups"], config["resnet_time_scale_shift"]
    middle = config["attn_norm_num_groups"] or (groups if shift == "default" else None)
    only({**config, "norm_groups of the middle": middle}, **{"norm_groups of the middle": [groups]})
    only(config, **{key: [value] for key, value in (FIXED | RESAMPLING).items()}, resnet_time_scale_shift=list(SHIFTS))
    if not set(downs) <= set(DOWN) or [UP[DOWN.index(down)] for down in reversed(downs)] != list(ups):
        raise UnreadableCheckpoint(
            f"its blocks are {', '.join([*downs, *ups])}; read are {', '.join(DOWN + UP)}, paired"
        )
    if any(other % width for other in widths):
        raise UnreadableCheckpoint(f"its widths {widths} are no multiples of the first")
    size = config["sample_size"]
    return build_spec(
        form=choose_form(forms, hints.form, what=scheduler["_class_name"]),
        network={
            "kind": "dhariwal_unet",
            "channels": width,
            "channel_mult": [other // width for other in widths],
            "num_blocks": config["layers_per_block"],
            "attn_resolutions": [size >> level for level, down in enumerate(downs) if down == DOWN[1]],
            "channels_per_head": config["attention_head_dim"],
            "dropout": config["dropout"],
            "scale_shift": SHIFTS[shift],
            "norm_groups": needed_norm_groups(groups, width),
        },
        noise={key: scheduler[key] for key in ("sigma_min", "sigma_max", "sigma_data", "rho") if key in scheduler},
        image_shape=(config["in_channels"], size, size),
        num_classes=config["num_class_embeds"] or 0,
        noise_scale=noise_scale,
    )


def write_configs(spec: ModelSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of the UNet2DModel and of the scheduler of a model, the inverse of `read_spec`.

    Raises ValueError if diffusers has no such model.
    """
    network, (channels, size, width) = spec.network, spec.image_shape
    if not isinstance(network, DhariwalUNetParams):
        raise ValueError(
            f"the network is {network.kind}, and UNet2DModel can be ADM alone: with the layers of DDPM++ and NCSN++ it "
            "has neither a box filter nor a residual pyramid"
        )
    if spec.guidance_range is not None:
        raise ValueError("UNet2DModel has no input for the weight of guidance that the model takes (guidance_range)")
    if network.double_norm:
        raise ValueError("UNet2DModel does not normalise scale and shift of its norms, as double_norm does")
    found = [name for name, (forms, scale) in SCHEDULERS.items() if spec.form in forms and scale == spec.noise_scale]
    if spec.noise.c_noise != "log_sigma":
        raise ValueError(
            f"every scheduler of diffusers asks for ln(sigma), and the model's c_noise is {spec.noise.c_noise}"
        )
    if not found:
        known = "; ".join(
            f"{name} {' or '.join(forms)} with noise_scale {scale:g}" for name, (forms, scale) in SCHEDULERS.items()
        )
        raise ValueError(
            f"no scheduler of diffusers has form {spec.form} with noise_scale {spec.noise_scale:g}: {known}"
        )
    if found[0] == EULER and spec.form == "skip" and spec.noise.sigma_min > NO_SHIFT * spec.noise.sigma_max:
        raise ValueError(
            f"{EULER} has no boundary at sigma_min={spec.noise.sigma_min:g}, which is too large to be left out"
        )
    if size != width:
        raise ValueError(f"UNet2DModel takes square images, and the model's are {width}x{size}")
    attends = [size >> level in network.attn_resolutions for level in range(len(network.channel_mult))]
    groups = network.norm_groups or 32
    config = {
        "_class_name": "UNet2DModel",
        **(FIXED | RESAMPLING),
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [network.channels * mult for mult in network.channel_mult],
        "layers_per_block": network.num_blocks,
        "down_block_types": [DOWN[on] for on in attends],
        "up_block_types": [UP[on] for on in reversed(attends)],
        "attention_head_dim": network.channels_per_head,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "dropout": network.dropout,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
        "num_class_embeds": spec.num_classes or None,
    }
    scheduler = {
        "_class_name": found[0],
        **{key: getattr(spec.noise, key) for key in ("sigma_min", "sigma_max", "sigma_data", "rho")},
    }
    return config, scheduler


def their_names(name: str, levels: int) -> list[str]:
    """Return the name that UNet2DModel has for one of our tensors, or its three for queries, keys and values."""
    name = name.removeprefix("net.")
    module, _, kind = name.rpartition(".")
    if module in PARTS:
        return [f"{PARTS[module]}.{kind}"]
    found = re.match(
        r"unet\.(encoder|middle|decoder)\.(?:level(\d+)_)?(block|down|up)?(\d+)?\.(.+)\.(weight|bias)$", name
    )
    if not found:
        raise ValueError(f"UNet2DModel has nothing for {name}")
    side, level, what, number, part, kind = found.groups()
    if side == "middle":
        block = "mid_block"
    elif side == "encoder":
        block = f"down_blocks.{int(level) - (what == 'down')}"
    else:
        block = f"up_blocks.{levels - 1 - int(level) - (what == 'up')}"
    if part.startswith("attention."):
        parts = QKV if part == "attention.qkv" else (BLOCK_PARTS[part],)
        return [f"{block}.attentions.{number}.{one}.{kind}" for one in parts]
    group = {"down": "downsamplers", "up": "upsamplers"}.get(what, "resnets")
    return [f"{block}.{group}.{number or 0}.{BLOCK_PARTS[part]}.{kind}"]


def _convert(tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    assert isinstance(spec.network, DhariwalUNetParams)
    refuse_larger(spec, tensors)
    for old, new in OLD_ATTENTION.items():
        tensors = {re.sub(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.", name): one for name, one in tensors.items()}
    levels, ours = len(spec.network.channel_mult), {}
    with torch.device("meta"):
        own = spec.build().state_dict()
    for name, like in own.items():
        theirs = their_names(name, levels)
        if absent := [one for one in theirs if one not in tensors]:
            raise UnreadableCheckpoint(f"its weights lack {absent[0]}")
        first, *others = [tensors.pop(one) for one in theirs]
        tensor = torch.cat([first, *others]) if others else first
        if name.endswith("embed.label.weight"):
            tensor = tensor.T.contiguous()  # a table of vectors; ours is a layer
        ours[name.removeprefix("net.")] = tensor.reshape(like.shape) if tensor.numel() == like.numel() else tensor
    if tensors:
        raise UnreadableCheckpoint(f"its weights have {min(tensors)}, which its configuration does not")
    return adopt(spec, ours, lambda name: name)


def write_diffusers(folder: Path, spec: ModelSpec, weights: Mapping[str, Tensor]) -> None:
    """Write the folder of a ConsistencyModelPipeline, which with an EDM scheduler is a denoiser's Euler sampler.

    Of a consistency function with EDM's scalings that sampler's only step is the function; of one that is shifted by
    sigma_min it is so to NO_SHIFT, far below a grey level.

    Raises ValueError if diffusers has no such model.
    """
    config, scheduler = write_configs(spec)
    index = {
        "_class_name": "ConsistencyModelPipeline",
        "unet": ["diffusers", config["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    save_tensors(folder / "unet" / WEIGHTS[0], to_diffusers(spec, weights))
    # The index last: with it the folder is a pipeline.
    texts = {f"unet/{CONFIG}": config, f"scheduler/{SCHEDULER}": scheduler, "model_index.json": index}
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def draws_with(spec: ModelSpec) -> str:
    """Return the arguments with which the pipeline draws what the model draws."""
    any_number = spec.noise_scale == SCHEDULERS[CONSISTENCY][1]  # of steps; its pipeline's default is one
    steps = f"num_inference_steps={TEACHER_STEPS if spec.form == 'denoiser' else 1}"
    return ", ".join([*([] if any_number else [steps]), *(["class_labels=0"] if spec.num_classes else [])])


def to_diffusers(spec: ModelSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model under the names of UNet2DModel, the inverse of reading them.

    The layer of augmentation labels, which sampling leaves at zero, is left out.
    """
    assert isinstance(spec.network, DhariwalUNetParams)
    theirs: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == "net.embed.augment.weight":
            continue
        if ".attention." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        if name == "net.embed.label.weight":
            tensor = tensor.T
        names = their_names(name, len(spec.network.channel_mult))
        theirs |= {one: part.contiguous() for one, part in zip(names, tensor.chunk(len(names)), strict=True)}
    return theirs
