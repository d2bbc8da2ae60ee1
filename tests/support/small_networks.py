"""Every kind of network, small; and how far what they compute is from what they should."""

import torch

from cm_core.networks import DhariwalUNetParams, EDM2Params, SongUNetParams


def small_networks(*, channels=16, attend_at=4, channels_per_head=16, fourier_scale=0.02):
    """Return the parameters of seven networks by name; they attend where images are `attend_at` pixels wide."""
    size = {"channels": channels, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (attend_at,)}
    return {
        "ddpmpp": SongUNetParams(**size),
        "ncsnpp": SongUNetParams(**size, encoder="residual", resample_filter="fir", fourier_scale=fourier_scale),
        "adm": DhariwalUNetParams(**size, channels_per_head=channels_per_head),
        "adm_added": DhariwalUNetParams(**size, channels_per_head=channels_per_head, scale_shift=False),
        "adm_scm": DhariwalUNetParams(**size, channels_per_head=channels_per_head, double_norm=True),
        "edm2": EDM2Params(**size, channels_per_head=channels_per_head),
        "edm2_scm": EDM2Params(**size, channels_per_head=channels_per_head, embedding="positional", double_norm=True),
    }


def build_shaken(params):
    """Return a network for images [1, 8, 8] of 4 classes; fresh residual branches are near zero, these are not."""
    net = params.build((1, 8, 8), num_classes=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return net


def pass_through(net, network_pass=None, batch=6):
    """Return the output and the gradients of one pass through `net`, by `network_pass` if given."""
    generator = torch.Generator().manual_seed(1)
    x, noise_labels = torch.randn(batch, 1, 8, 8, generator=generator), torch.rand(batch, generator=generator)
    net.zero_grad()
    out = (network_pass or net)(x, noise_labels, torch.arange(batch) % 4)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in net.parameters())]


def relative(found, expected):
    """Return |found - expected| / |expected| over all tensors of a list."""
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True))
    return (difference / sum(b.double().square().sum() for b in expected)).sqrt().item()
