"""Pickles of NVlabs/edm, NVlabs/edm2 and locuslab/ect: modules described by class, constructor's arguments and state.

The source of the classes, which such a file carries, is not read: class name and arguments choose a network of ours.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from torch import Tensor

from cm_core.formats import edm2
from cm_core.formats.base import (
    NVLABS_ROWS,
    Checkpoint,
    Hints,
    UnreadableCheckpoint,
    adopt,
    build_spec,
    choose_form,
    levels_by_size,
    only,
    refuse_larger,
    rows_by_role,
)
from cm_core.formats.pickles import CLASSES, TENSORS, Instance, read_pickle, refuse_endless
from cm_core.model import Form, ModelSpec
from cm_core.networks import DhariwalUNetParams, Network, SongUNetParams
from cm_core.networks.layers import EMB_MULT, positional_frequencies

Settings = Mapping[str, Any]

FORMS: dict[str, tuple[Form, ...]] = {
    "EDMPrecond": ("denoiser",),
    "ECMPrecond": ("skip", "unshifted"),
    edm2.CLASS: ("denoiser",),
}
NAMES = {  # format and licence
    "EDMPrecond": ("NVlabs EDM", "CC BY-NC-SA 4.0"),
    edm2.CLASS: ("NVlabs EDM2", "CC BY-NC-SA 4.0"),
    "ECMPrecond": ("locuslab ECT", "none stated; tuned from NVlabs EDM, CC BY-NC-SA 4.0"),
}
OTHERS = {  # preconditioning of the same repositories that ModelSpec cannot express
    "VPPrecond": "VP preconditioning",
    "VEPrecond": "VE preconditioning",
    "iDDPMPrecond": "iDDPM preconditioning",
}
SHARED = {  # the constructors' defaults, which a file does not repeat
    "label_dim": 0,
    "augment_dim": 0,
    "sigma_data": 0.5,
    "dropout": 0.1,
    "channel_mult_emb": EMB_MULT,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "SongUNet": {
        "model_channels": 128,
        "channel_mult": [1, 2, 2, 2],
        "num_blocks": 4,
        "attn_resolutions": [16],
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
    },
    "DhariwalUNet": {
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [32, 16, 8],
    },
}
DESCRIBING = ("_init_kwargs", "sigma_data", "sigma_min")  # what of a wrapper's state is read beside its tensors
WITHOUT_EFFECT = {"use_fp16", "sigma_min", "sigma_max", "label_dropout", "model_type", "img_resolution", "img_channels"}
DHARIWAL_CHANNELS_PER_HEAD = 64  # a constant of the block
LONGEST_NAME = 1000  # letters of a module's path
FOURIER_SCALE = 16.0  # of NCSN++; the frequencies themselves are in the file
CALLS = {
    **TENSORS,
    "torch_utils.persistence._reconstruct_persistent_obj": lambda meta: Instance(
        meta["class_name"], state=meta["state"]
    ),
}
PARTS = {  # EDM's modules and ours
    **{"map_layer0": "embed.layer0", "map_layer1": "embed.layer1", "map_label": "embed.label"},
    **{"map_augment": "embed.augment", "map_noise.freqs": "embed.frequencies"},
    **{"out_norm": "unet.output_norm", "out_conv": "unet.output"},
}
BLOCK_PARTS = {"norm2": "attention.norm", "qkv": "attention.qkv", "proj": "attention.proj"}


def read_edm(file: BinaryIO, hints: Hints) -> Checkpoint:
    """Read the model `ema` of a pickle. Raises UnreadableCheckpoint for other files, wrappers and networks."""
    content = read_pickle(file, CALLS, CLASSES)
    model = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(model, Instance):
        raise UnreadableCheckpoint("it holds no model under the key 'ema'")
    refuse_endless([model.class_name, *(model.state.get(key) for key in DESCRIBING)])
    if model.class_name not in FORMS:
        known = OTHERS.get(model.class_name, "a model of another kind")
        raise UnreadableCheckpoint(f"{known} ({model.class_name}); read are {', '.join(FORMS)}")
    arguments = model.state["_init_kwargs"]
    is_edm2 = model.class_name == edm2.CLASS
    network, settings = (edm2.read_network if is_edm2 else _network)(arguments)
    form = choose_form(FORMS[model.class_name], hints.form, what=model.class_name)
    noise: dict[str, Any] = {"sigma_data": model.state["sigma_data"]}
    if form == "skip":
        noise["sigma_min"] = model.state["sigma_min"]
    size = settings["img_resolution"]
    spec = build_spec(
        form=form,
        network=network,
        noise=noise,
        image_shape=(settings["img_channels"], size, size),
        num_classes=settings["label_dim"],
        augment_dim=settings.get("augment_dim", 0),
    )
    tensors = {name.removeprefix("model."): tensor for name, tensor in _tensors(model, set())}
    refuse_larger(spec, tensors)
    weights = (edm2.convert if is_edm2 else _convert)(tensors, spec)
    return Checkpoint(*NAMES[model.class_name], spec, weights, NVLABS_ROWS)


def _network(arguments: Settings) -> tuple[Network, Settings]:
    """Return the network of a constructor's arguments, and the arguments with their defaults."""
    kind = arguments.get("model_type", "DhariwalUNet")
    if kind not in DEFAULTS:
        raise UnreadableCheckpoint(f"its network is {kind!r}; read are {', '.join(DEFAULTS)}")
    defaults = SHARED | DEFAULTS[kind]
    if unknown := sorted(arguments.keys() - defaults.keys() - WITHOUT_EFFECT):
        raise UnreadableCheckpoint(f"its {kind} has the argument {unknown[0]!r}, which this package does not know")
    settings = {**defaults, **arguments}
    common = {
        "channels": settings["model_channels"],
        "channel_mult": tuple(settings["channel_mult"]),
        "num_blocks": settings["num_blocks"],
        "attn_resolutions": tuple(settings["attn_resolutions"]),
        "dropout": settings["dropout"],
    }
    only(settings, channel_mult_emb=[EMB_MULT])
    if kind == "DhariwalUNet":
        return DhariwalUNetParams(**common, channels_per_head=DHARIWAL_CHANNELS_PER_HEAD), settings
    fourier = settings["embedding_type"] == "fourier"
    only(
        settings,
        embedding_type=["positional", "fourier"],
        channel_mult_noise=[2 if fourier else 1],
        encoder_type=["standard", "residual"],
        decoder_type=["standard"],
        resample_filter=[[1, 1], [1, 3, 3, 1]],
    )
    network = SongUNetParams(
        **common,
        fourier_scale=FOURIER_SCALE if fourier else None,
        encoder=settings["encoder_type"],
        resample_filter="box" if settings["resample_filter"] == [1, 1] else "fir",
    )
    return network, settings


def _tensors(module: Instance, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a described module, as `named_parameters` and `named_buffers` do of a real one."""
    groups = [module.state[group] for group in ("_parameters", "_buffers")] if isinstance(module, Instance) else []
    if len(prefix) > LONGEST_NAME:
        raise UnreadableCheckpoint(f"a module's name has more than {LONGEST_NAME:,} letters")
    if not groups or seen & {id(module), *map(id, groups)}:
        raise UnreadableCheckpoint(f"its module {prefix.rstrip('.') or 'ema'} is none, or has several places")
    seen |= {id(module), *map(id, groups)}
    for group in groups:
        for name, tensor in group.items():
            if isinstance(tensor, Tensor):
                yield prefix + name, tensor
    for name, inner in module.state["_modules"].items():
        if inner is not None:
            yield from _tensors(inner, seen, f"{prefix}{name}.")


def _convert(tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Return the weights under this package's names."""
    assert isinstance(spec.network, SongUNetParams | DhariwalUNetParams)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".resample_filter")}
    if isinstance(spec.network, DhariwalUNetParams):
        tensors.pop("map_noise.freqs", None)
    elif spec.network.fourier_scale is None:
        tensors["map_noise.freqs"] = positional_frequencies(spec.network.channels // 2, endpoint=True)
    else:
        tensors["map_noise.freqs"] = tensors["map_noise.freqs"] * (2 * math.pi)
    per_head = getattr(spec.network, "channels_per_head", None)
    for name, tensor in tensors.items():
        if ".qkv." in name:
            tensors[name] = rows_by_role(tensor, per_head)
    return adopt(spec, tensors, _renamer(spec))


def _renamer(spec: ModelSpec) -> Callable[[str], str]:
    levels = levels_by_size(spec)

    def rename(name: str) -> str:
        module, _, kind = name.rpartition(".")
        if name in PARTS:
            return PARTS[name]
        if module in PARTS:
            return f"{PARTS[module]}.{kind}"
        side, block, *rest = module.split(".")
        size, _, what = block.partition("_")
        level = levels.get(size)
        if level is None:
            return name
        if what == "conv":
            return f"unet.input.{kind}"
        if what in ("aux_norm", "aux_conv"):
            return f"unet.output{'_norm' if what == 'aux_norm' else ''}.{kind}"
        if what == "aux_residual":
            return f"unet.pyramid.level{level}_down.conv.{kind}"
        part = ".".join(BLOCK_PARTS.get(one, one) for one in rest)
        if what in ("in0", "in1"):
            return f"unet.middle.{what[-1]}.{part}.{kind}"
        return f"unet.{'encoder' if side == 'enc' else 'decoder'}.level{level}_{what}.{part}.{kind}"

    return rename
