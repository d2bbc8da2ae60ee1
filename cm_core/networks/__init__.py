"""The raw networks F: `net(x, noise_labels, class_labels, augment_labels) -> like x`, chosen by `kind`."""

from cm_core.networks.dhariwal_unet import DhariwalUNetParams
from cm_core.networks.mlp import MLPParams
from cm_core.networks.song_unet import SongUNetParams

Network = SongUNetParams | DhariwalUNetParams | MLPParams

__all__ = ["DhariwalUNetParams", "MLPParams", "Network", "SongUNetParams"]
