"""State dicts of openai/consistency_models: ADM networks as EDM teachers and as consistency functions.

Such a file holds tensors alone. Widths, depth and places of attention are read from their shapes. Whether the network
is a denoiser or a consistency function, and the width of a head, it does not say.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from cm_core.formats.base import Checkpoint, Hints, UnreadableCheckpoint, adopt, build_spec, needed_norm_groups
from cm_core.formats.pickles import load_torch
from cm_core.networks import DhariwalUNetParams

NAME, LICENCE = "OpenAI consistency models", "MIT"
NOISE_SCALE = 1000.0
NORM_GROUPS = 32
PUBLISHED_SIZES = {(1, 2, 3, 4): 64, (1, 1, 2, 2, 4, 4): 256}  # images of the released networks, by their widths
FORMS = ("denoiser", "skip")
PARTS = {
    **{"time_embed.0": "embed.layer0", "time_embed.2": "embed.layer1", "label_emb": "embed.label"},
    **{"input_blocks.0.0": "unet.input", "out.0": "unet.output_norm", "out.2": "unet.output"},
}
BLOCK_PARTS = {
    **{"in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine", "skip_connection": "skip"},
    **{"out_layers.0": "norm1", "out_layers.3": "conv1"},
}
ATTENTION_PARTS = {"norm": "attention.norm", "qkv": "attention.qkv", "proj_out": "attention.proj"}


def read_openai(path: Path, hints: Hints) -> Checkpoint:
    """Read a state dict. Raises UnreadableCheckpoint for another one, or if a hint is missing."""
    tensors = load_torch(path, dict, mmap=True)
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()) or "time_embed.0.weight" not in tensors:
        raise UnreadableCheckpoint("it is no state dict of a U-Net in OpenAI's names")
    if hints.form not in FORMS:
        raise UnreadableCheckpoint(
            f"a state dict of {NAME} does not say what it is; give its form: denoiser (an EDM teacher) or skip (a "
            f"consistency model, CD or CT){f', not {hints.form}' if hints.form else ''}"
        )
    levels, num_blocks = read_layout(tensors)
    stem = tensors["input_blocks.0.0.weight"]
    firsts = [f"input_blocks.{1 + level * (num_blocks + 1)}" for level in range(levels)]
    widths = [len(tensors[f"{first}.0.out_layers.0.weight"]) for first in firsts]
    channel_mult = tuple(width // len(stem) for width in widths)
    size = hints.resolution or PUBLISHED_SIZES.get(channel_mult)
    if size is None:
        raise UnreadableCheckpoint(f"its widths {channel_mult} are of no released network; give the resolution")
    spec = build_spec(
        form=hints.form,
        network=DhariwalUNetParams(
            channels=len(stem),
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attn_resolutions=tuple(size >> i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in tensors),
            channels_per_head=hints.channels_per_head or DhariwalUNetParams().channels_per_head,
            norm_groups=needed_norm_groups(NORM_GROUPS, len(stem)),
            scale_shift=len(tensors[f"{firsts[0]}.0.emb_layers.1.weight"]) == 2 * widths[0],
        ),
        noise={},
        image_shape=(stem.shape[1], size, size),
        num_classes=len(tensors.get("label_emb.weight", ())),
        noise_scale=NOISE_SCALE,
    )
    if "label_emb.weight" in tensors:  # a table of vectors; ours is a layer
        tensors["label_emb.weight"] = tensors["label_emb.weight"].T.contiguous()
    for name, tensor in tensors.items():
        if re.search(r"\.(qkv|proj_out)\.weight$", name):
            tensors[name] = tensor.reshape(*tensor.shape[:2], 1, 1)  # a convolution over the pixels as a sequence
    return Checkpoint(NAME, LICENCE, spec, adopt(spec, tensors, lambda name: _rename(name, levels, num_blocks)))


def read_layout(names: Iterable[str]) -> tuple[int, int]:
    """Return (levels, residual blocks per level) of a U whose blocks resample (resblock_updown)."""
    blocks = {match.groups() for name in names if (match := re.match(r"output_blocks\.(\d+)\.(\d+)\.(\w+)", name))}
    if any(part in ("conv", "op") for *_, part in blocks):
        raise UnreadableCheckpoint(
            "its U-Net resamples by layers between its blocks; read are those with resblock_updown"
        )
    ups = sum(part == "in_layers" and position != "0" for _, position, part in blocks)
    decoder = len({number for number, *_ in blocks})
    return ups + 1, decoder // (ups + 1) - 1


def _rename(name: str, levels: int, num_blocks: int) -> str:
    for part, ours in PARTS.items():
        if name.startswith(f"{part}."):
            return name.replace(part, ours, 1)
    found = re.match(r"(input|middle|output)_blocks?\.(\d+)\.(?:(\d+)\.)?(.+)\.(weight|bias)$", name)
    if not found:
        return name
    side, number, position, part, kind = found.groups()
    level, index = divmod(int(number) - (side == "input"), num_blocks + 1)
    if side == "middle":
        block = f"middle.{int(number) // 2}"
    elif side == "input":
        block = f"encoder.level{level}_block{index}" if index < num_blocks else f"encoder.level{level + 1}_down"
    elif position != "0" and part not in ATTENTION_PARTS:
        block = f"decoder.level{levels - level - 2}_up"
    else:
        block = f"decoder.level{levels - level - 1}_block{index}"
    return f"unet.{block}.{BLOCK_PARTS.get(part) or ATTENTION_PARTS.get(part, part)}.{kind}"
