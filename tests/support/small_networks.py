"""Every kind of network, small; and how far what they compute is from what they should."""

from cm_core.networks import DhariwalUNetParams, SongUNetParams


def small_networks(*, channels=16, attend_at=4, channels_per_head=16, fourier_scale=0.02):
    """Return the parameters of four networks by name; they attend where images are `attend_at` pixels wide."""
    size = {"channels": channels, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (attend_at,)}
    return {
        "ddpmpp": SongUNetParams(**size),
        "ncsnpp": SongUNetParams(**size, encoder="residual", resample_filter="fir", fourier_scale=fourier_scale),
        "adm": DhariwalUNetParams(**size, channels_per_head=channels_per_head),
        "adm_added": DhariwalUNetParams(**size, channels_per_head=channels_per_head, scale_shift=False),
    }


def relative(found, expected):
    """Return |found - expected| / |expected| over all tensors of a list."""
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True))
    return (difference / sum(b.double().square().sum() for b in expected)).sqrt().item()
