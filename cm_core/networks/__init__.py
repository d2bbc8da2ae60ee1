"""The raw networks F: `net(x, noise_labels, class_labels, augment_labels) -> like x`, chosen by `kind`.

Built with `two_times`, they take a fifth argument, a second time in the units of `noise_labels` (MeanFlow); with
`takes_guidance` a sixth, weights of guidance (2210.03142).
"""

from cm_core.networks.dhariwal_unet import DhariwalUNetParams
from cm_core.networks.edm2 import EDM2Params
from cm_core.networks.mlp import MLPParams
from cm_core.networks.song_unet import SongUNetParams

Network = SongUNetParams | DhariwalUNetParams | EDM2Params | MLPParams

__all__ = ["DhariwalUNetParams", "EDM2Params", "MLPParams", "Network", "SongUNetParams"]
