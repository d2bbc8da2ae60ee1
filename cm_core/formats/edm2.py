"""Networks in the pickles of NVlabs/edm2, in their own names and with their constructor's arguments."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cm_core.formats.base import UnreadableCheckpoint, adopt, levels_by_size, only, rows_by_role
from cm_core.model import ModelSpec
from cm_core.networks import EDM2Params
from cm_core.networks.edm2 import LABEL_SHARE, LARGEST, RESIDUAL_SHARE

CLASS = "Precond"  # of the wrapper
DEFAULTS: dict[str, Any] = {  # the constructors' defaults, which a file does not repeat
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": [16, 8],
    "label_balance": LABEL_SHARE,
    "concat_balance": 0.5,
    "res_balance": RESIDUAL_SHARE,
    "attn_balance": RESIDUAL_SHARE,
    "clip_act": LARGEST,
    "resample_filter": [1, 1],
    "channels_per_head": 64,
    "dropout": 0.0,
}
TAKEN = {"img_resolution", "img_channels", "label_dim"}
WITHOUT_EFFECT = {"use_fp16", "sigma_data", "logvar_channels"}  # the first two are found elsewhere
PARTS = {  # EDM2's modules and ours
    **{"emb_fourier.freqs": "embed.frequencies", "emb_fourier.phases": "embed.phases"},
    **{"emb_noise.weight": "embed.noise.weight", "emb_label.weight": "embed.label.weight"},
    **{"out_conv.weight": "unet.output.weight", "out_gain": "unet.output.gain"},
}
BLOCK_PARTS = {
    **{"conv_res0.weight": "conv0.weight", "conv_res1.weight": "conv1.weight", "conv_skip.weight": "skip.weight"},
    **{"emb_linear.weight": "modulation.weight", "emb_gain": "modulation.gain"},
    **{"attn_qkv.weight": "attention.qkv.weight", "attn_proj.weight": "attention.proj.weight"},
}


def read_network(arguments: Mapping[str, Any]) -> tuple[EDM2Params, Mapping[str, Any]]:
    """Return the network of a constructor's arguments, and the arguments with their defaults.

    Raises UnreadableCheckpoint for an argument that this package's network does not have.
    """
    if unknown := sorted(arguments.keys() - DEFAULTS.keys() - TAKEN - WITHOUT_EFFECT):
        raise UnreadableCheckpoint(f"its EDM2 network has the argument {unknown[0]!r}, which this package has not")
    settings = {**DEFAULTS, **arguments}
    constants = ("label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act", "resample_filter")
    only(settings, **{name: [DEFAULTS[name]] for name in constants})
    only(settings, channel_mult_noise=[None, 1], channel_mult_emb=[None, max(settings["channel_mult"])])
    network = EDM2Params(
        channels=settings["model_channels"],
        channel_mult=tuple(settings["channel_mult"]),
        num_blocks=settings["num_blocks"],
        attn_resolutions=tuple(settings["attn_resolutions"]),
        channels_per_head=settings["channels_per_head"],
        dropout=settings["dropout"],
    )
    return network, settings


def convert(tensors: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Return the weights under this package's names, without the learned weight of the loss."""
    assert isinstance(spec.network, EDM2Params)
    levels, per_head, found = levels_by_size(spec), spec.network.channels_per_head, {}
    for name, tensor in tensors.items():
        if name.startswith("logvar_"):
            continue
        if ".attn_qkv." in name:
            tensor = rows_by_role(tensor, per_head)
        found[_rename(name.removeprefix("unet."), levels)] = tensor.reshape(tensor.shape or (1,))
    return adopt(spec, found, str)


def _rename(name: str, levels: Mapping[str, int]) -> str:
    if name in PARTS:
        return PARTS[name]
    side, _, rest = name.partition(".")
    block, _, part = rest.partition(".")
    size, _, what = block.partition("_")
    if size not in levels:
        return name
    if what == "conv":
        return f"unet.input.{part}"
    part = BLOCK_PARTS.get(part, part)
    if what in ("in0", "in1"):
        return f"unet.middle.{what[-1]}.{part}"
    return f"unet.{'encoder' if side == 'enc' else 'decoder'}.level{levels[size]}_{what}.{part}"
