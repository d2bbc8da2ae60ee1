"""Latents: what an autoencoder makes of images, learnt by networks in place of pixels (2112.10752).

The autoencoder is an AutoencoderKL of diffusers, an optional package that is imported where one is used. Only
safetensors are read.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cm_core.metrics.torchvision_shim import ensure_torchvision
from cm_core.noise import Noise
from cm_core.params import Params
from cm_core.tensors import from_pixels, to_pixels

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"  # diffusers' names
DECODER_FILE = "decoder.safetensors"  # beside prepared data, and beside the weights of a model that learnt them
KIND = "AutoencoderKL"
DECODING = ("post_quant_conv.", "decoder.")  # names of the layers that a decoder consists of
SPREAD = Noise().sigma_data  # standard deviation of the latents that a network sees
AT_ONCE = 8 * 256 * 256  # pixels that pass the autoencoder together, which take a few GB in a decoder

ToPixels = Callable[[Tensor], Tensor]  # a model's output, float [B, C, h, w] -> uint8 [B, H, W, C]


class Latents(Params):
    """How a network's inputs x and the autoencoder's latents z are related: x = SPREAD (z - mean) / std."""

    decoder: str
    """SHA-256 of the file of the decoder."""
    pixel_shape: tuple[int, int, int]
    """Channels, height, width of the decoded images."""
    mean: tuple[float, ...]
    """Of each channel over the training images (EDM2, 2312.02696)."""
    std: tuple[float, ...]
    """Of each channel of latents that are drawn from the posterior."""

    def shift_and_scale(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return b and a of z = b + a x, float32 [C, 1, 1]."""
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std / SPREAD


def read_config(folder: Path) -> dict[str, Any]:
    """Read the description of an autoencoder, without its weights.

    Raises ValueError, one line, for a folder that holds no AutoencoderKL with weights as safetensors.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        below = f"; its folder vae/ does: name {folder / 'vae'}" if (folder / "vae" / CONFIG_FILE).is_file() else ""
        raise ValueError(f"{folder}: holds no {CONFIG_FILE} of an {KIND}{below}")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"{folder}: holds no {WEIGHTS_FILE}; weights are read from safetensors alone, not from pickles"
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    kind = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
    if kind != KIND:
        raise ValueError(f"{path}: describes {kind}; allowed is {KIND}")
    channels, levels = config.get("in_channels"), config.get("block_out_channels")
    if channels not in (1, 3) or config.get("out_channels") != channels:
        raise ValueError(f"{path}: in_channels={channels}, out_channels={config.get('out_channels')}; allowed: 1 or 3")
    for key, values in (("block_out_channels", levels), ("latent_channels", [config.get("latent_channels")])):
        if not (isinstance(values, list) and values and all(type(one) is int and one > 0 for one in values)):
            raise ValueError(f"{path}: {key}={config.get(key)!r}; positive whole numbers are expected")
    return config


def latent_shape(config: Mapping[str, Any], pixel_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return [C, h, w] of the latents of images [C, H, W]; raise ValueError if the autoencoder does not take them."""
    channels, height, width = pixel_shape
    if channels != config["in_channels"]:
        wanted = {1: "grey", 3: "rgb"}[config["in_channels"]]
        raise ValueError(
            f"the autoencoder takes images of {config['in_channels']} channels, these have {channels};"
            f" set data.channels={wanted}"
        )
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"the autoencoder divides each side by {factor}, and images of {width}x{height} pixels do not divide so;"
            f" set data.resolution to a multiple of {factor}"
        )
    return config["latent_channels"], height // factor, width // factor


def images_at_once(pixel_shape: tuple[int, int, int]) -> int:
    """Return how many images [C, H, W] pass an autoencoder together; it does not affect them."""
    return max(1, AT_ONCE // (pixel_shape[1] * pixel_shape[2]))


def load_autoencoder(folder: Path, device: torch.device) -> nn.Module:
    """Load an autoencoder in float32, for inference; raise ValueError for one that is damaged or incomplete."""
    read_config(folder)
    kind = autoencoder_class()
    try:
        model, found = kind.from_pretrained(
            str(folder.resolve()),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a whole {KIND} ({' '.join(str(error).split())[:200]})") from error
    for key, where in (("missing_keys", "in the network"), ("unexpected_keys", "in the file")):
        if odd := sorted(found[key]):  # diffusers would go on with random weights
            raise ValueError(f"{folder}: weights and {CONFIG_FILE} differ: {odd[0]} is {where} alone")
    return model.to(device).eval().requires_grad_(False)


def check_package() -> None:
    """Raise ValueError unless diffusers is installed, without importing it."""
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("an autoencoder needs the package diffusers (the extra latents): pip install diffusers")


def autoencoder_class() -> Any:
    """Return diffusers' AutoencoderKL; raise ValueError if the package is not installed."""
    check_package()
    try:
        if importlib.util.find_spec("torchvision"):
            ensure_torchvision()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise ValueError(f"diffusers cannot be imported ({' '.join(str(error).split())[:200]})") from error
    return AutoencoderKL


@torch.no_grad()
def encode(autoencoder: Any, pixels: np.ndarray, device: torch.device) -> Tensor:
    """Return mean and standard deviation of the posterior of each of uint8 images [B, H, W, C], [B, 2, C, h, w]."""
    x = from_pixels(torch.from_numpy(pixels).to(device))
    posterior = autoencoder.encode(x).latent_dist
    return torch.stack([posterior.mean, posterior.std], 1)


def write_decoder(autoencoder: Any, path: Path) -> str:
    """Write the decoding half with its description as one file, atomically; return its SHA-256."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in autoencoder.state_dict().items()}
    config = {key: value for key, value in autoencoder.config.items() if key[0] != "_"}  # no paths of this machine
    partial = path.with_name(path.name + ".partial")
    save_file(
        {name: tensor for name, tensor in weights.items() if name.startswith(DECODING)},
        partial,
        metadata={CONFIG_FILE: json.dumps(config, sort_keys=True)},
    )
    os.replace(partial, path)
    return _sha256(path)


def find_decoder(folder: Path) -> Path:
    """Return the file of a model's decoder, beside its weights or, of a further EMA, in the folder above.

    Raises FileNotFoundError if there is none.
    """
    for place in (folder, folder.resolve().parent):
        if (place / DECODER_FILE).is_file():
            return place / DECODER_FILE
    raise FileNotFoundError(
        f"{folder}: its model makes latents, and {DECODER_FILE}, which makes images of them, is missing; copy it from"
        " the model's first folder or from out/prepare"
    )


def load_decoder(folder: Path, latents: Latents, device: torch.device) -> ToPixels:
    """Return what decodes the output of a model; the last one stays in memory.

    Raises FileNotFoundError if the folder has no decoder, ValueError if it is not the one that `latents` name.
    """
    return _open_decoder(find_decoder(folder), latents, device)


@lru_cache(maxsize=1)
def _open_decoder(path: Path, latents: Latents, device: torch.device) -> ToPixels:
    if _sha256(path) != latents.decoder:
        raise ValueError(f"{path}: is not the decoder that the model was trained with (its SHA-256 differs)")
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()[CONFIG_FILE])
        weights = {name: file.get_tensor(name) for name in file.keys()}
    with torch.device("meta"):
        autoencoder = autoencoder_class().from_config(config)
    autoencoder.load_state_dict(weights, strict=False, assign=True)
    autoencoder.encoder = autoencoder.quant_conv = None  # no weights of these were written
    autoencoder = autoencoder.to(device).eval().requires_grad_(False)
    (shift, scale), count = latents.shift_and_scale(device), images_at_once(latents.pixel_shape)

    @torch.no_grad()
    def decode(x: Tensor) -> Tensor:
        return torch.cat([to_pixels(autoencoder.decode(shift + scale * part).sample) for part in x.split(count)])

    return decode


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
