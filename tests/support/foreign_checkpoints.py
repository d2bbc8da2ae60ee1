"""Files in the formats of other code, written from the state dict of an ADM UNet2DModel of diffusers."""

import io
import pickle
import re
import sys
from contextlib import contextmanager
from types import ModuleType

import torch

DOWN, UP = ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), ("ResnetUpsampleBlock2D", "AttnUpBlock2D")
OPENAI_RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
OPENAI_TOP = {
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"class_embedding": "label_emb", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
}
EDM_RESNET = {
    **{"norm1": "norm0", "conv1": "conv0", "time_emb_proj": "affine"},
    **{"norm2": "norm1", "conv2": "conv1", "conv_shortcut": "skip"},
}
EDM_TOP = {
    **{"time_embedding.linear_1": "map_layer0", "time_embedding.linear_2": "map_layer1"},
    **{"class_embedding": "map_label", "conv_norm_out": "out_norm", "conv_out": "out_conv"},
}


def make_unet(widths=(32, 64), attends=(False, True), *, layers=1, shift="scale_shift", classes=10, head=32, groups=32):
    """Return a UNet2DModel for 16x16 images with random weights, none of them zero."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=[DOWN[on] for on in attends],
        up_block_types=[UP[on] for on in reversed(attends)],
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=head,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift=shift,
        num_class_embeds=classes,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def to_openai(unet):
    """Return the state dict of a UNet2DModel as openai/consistency_models names it."""
    layers, levels = unet.config.layers_per_block, len(unet.config.block_out_channels)
    attends = {False: unet.config.down_block_types, True: unet.config.up_block_types}

    def block(match):
        side, number, kind, index, part = match.groups()
        if side == "mid_block":
            return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{part}"
        up, number, index = side == "up_blocks", int(number), int(index)
        if kind == "upsamplers":
            return f"output_blocks.{number * (layers + 1) + layers}.{1 + ('Attn' in attends[up][number])}.{part}"
        place = number * (layers + 1) + (layers if kind == "downsamplers" else index) + (not up)
        return f"{'output' if up else 'input'}_blocks.{place}.{int(kind == 'attentions')}.{part}"

    assert levels == len(attends[True])
    return renamed(
        unet.state_dict(),
        OPENAI_TOP,
        OPENAI_RESNET,
        {"group_norm": "norm", "to_out.0": "proj_out"},
        block,
        layout="3hd",
    )


def to_edm(unet):
    """Return the state dict of a UNet2DModel as NVlabs/edm's DhariwalUNet names it."""
    size, levels = unet.config.sample_size, len(unet.config.block_out_channels)

    def block(match):
        side, number, kind, index, part = match.groups()
        if side == "mid_block":
            return f"dec.{size >> (levels - 1)}x{size >> (levels - 1)}_in{index}.{part}"
        level = int(number) if side == "down_blocks" else levels - 1 - int(number)
        level += {"downsamplers": 1, "upsamplers": -1}.get(kind, 0)
        what = {"downsamplers": "down", "upsamplers": "up"}.get(kind, f"block{index}")
        return f"{'enc' if side == 'down_blocks' else 'dec'}.{size >> level}x{size >> level}_{what}.{part}"

    parts = {"group_norm": "norm2", "to_out.0": "proj"}
    tensors = renamed(unet.state_dict(), EDM_TOP, EDM_RESNET, parts, block, layout="hd3")
    tensors = {name.replace("conv_in.", f"enc.{size}x{size}_conv."): tensor for name, tensor in tensors.items()}
    tensors["map_label.weight"] = tensors["map_label.weight"].T.contiguous()
    return tensors


def renamed(tensors, top, resnet, attention, block, *, layout):
    """Rename tensors; queries, keys and values become one `qkv` with rows (3, head, channel) or (head, channel, 3)."""
    made = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if ".to_k" in name or ".to_v" in name:
            continue
        if ".to_q" in name:
            parts = torch.stack([tensors[name.replace("to_q", one)] for one in ("to_q", "to_k", "to_v")])
            tensor = parts.flatten(0, 1) if layout == "3hd" else parts.transpose(0, 1).flatten(0, 1)
            module = module.replace("to_q", "qkv")
        if tensor.ndim == 2 and ("qkv" in module or "to_out" in module):
            tensor = tensor[:, :, None] if layout == "3hd" else tensor[:, :, None, None]
        pattern = (
            r"(down_blocks|up_blocks|mid_block)\.?(\d+)?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
        )
        found = re.fullmatch(pattern, module)
        if found:
            known = attention if found[3] == "attentions" else resnet
            inner = known.get(found[5], found[5])
            module = block(re.fullmatch(pattern, module[: found.start(5)] + inner))
        made[f"{top.get(module, module)}.{kind}"] = tensor
    return made


class Described:
    """Pickles as a module of NVlabs/edm does: by a function of its package, a class name and a state."""

    def __init__(self, class_name, **state):
        self.meta = {"type": "class", "version": 6, "module_src": "", "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@contextmanager
def edm_modules():
    """Have the modules that EDM's pickles name, while one is written."""
    module = ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("nothing of a file is called")

    _reconstruct_persistent_obj.__module__, _reconstruct_persistent_obj.__qualname__ = (
        module.__name__,
        "_reconstruct_persistent_obj",
    )
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules |= {"torch_utils": ModuleType("torch_utils"), module.__name__: module}
    try:
        yield
    finally:
        for name in ("torch_utils", module.__name__):
            del sys.modules[name]


def module_of(class_name, tensors=None, modules=None, **state):
    """Return a described module with these parameters and inner modules."""
    return Described(class_name, _parameters=tensors or {}, _buffers={}, _modules=modules or {}, **state)


def edm_pickle(tensors, class_name="EDMPrecond", **arguments):
    """Return the bytes of a pickle whose `ema` is a wrapper with these constructor's arguments and tensors."""
    tree = {}
    for name, tensor in tensors.items():
        node = tree
        for part in name.split(".")[:-1]:
            node = node.setdefault(part, {})
        node[name.rpartition(".")[2]] = tensor

    def build(node, kind):
        inner = {name: build(child, "Layer") for name, child in node.items() if isinstance(child, dict)}
        own = {name: torch.nn.Parameter(child) for name, child in node.items() if not isinstance(child, dict)}
        return module_of(kind, own, inner)

    network = build(tree, arguments.get("model_type", "DhariwalUNet"))
    ema = module_of(class_name, modules={"model": network}, _init_kwargs=arguments, sigma_data=0.5, sigma_min=0)
    with edm_modules():
        buffer = io.BytesIO()
        pickle.dump({"ema": ema}, buffer)
    return buffer.getvalue()


def adm_pickle(unet, **arguments):
    """Return the bytes of EDM's pickle of such a network for 16x16 images."""
    settings = unet.config
    return edm_pickle(
        to_edm(unet),
        img_resolution=16,
        img_channels=3,
        label_dim=settings.num_class_embeds,
        model_type="DhariwalUNet",
        model_channels=settings.block_out_channels[0],
        channel_mult=[width // settings.block_out_channels[0] for width in settings.block_out_channels],
        num_blocks=settings.layers_per_block,
        attn_resolutions=[8],
        **arguments,
    )
