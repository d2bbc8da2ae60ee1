"""A tiny AutoencoderKL of diffusers with random weights, saved as published ones are."""

from pathlib import Path

import torch


def save_autoencoder(folder: Path, *, channels: int = 1, levels: int = 2, latent_channels: int = 2) -> Path:
    """Save one that divides sides by 2 ** (levels - 1); return its folder."""
    from cm_core.latents import autoencoder_class

    torch.manual_seed(0)
    autoencoder = autoencoder_class()(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=8,
    )
    with torch.no_grad():  # else each image is decoded to nearly the same grey
        for weights in autoencoder.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    autoencoder.save_pretrained(folder)
    return folder
