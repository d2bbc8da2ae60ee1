"""Any number of images through the exported sampler of every network."""

import pytest
import torch

from cm_core.formats.graphs import SamplerGraph, write_program
from cm_core.model import ModelSpec
from cm_core.networks import DhariwalUNetParams, EDM2Params, SongUNetParams
from cm_core.noise import Noise

SMALL = {"channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NETWORKS = [
    SongUNetParams(**SMALL),
    DhariwalUNetParams(**SMALL, channels_per_head=16),
    EDM2Params(**SMALL, channels_per_head=16),
]


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.kind)
def test_a_program_draws_any_number_of_images(network, tmp_path):
    spec = ModelSpec(form="skip", network=network, noise=Noise(), image_shape=(3, 8, 8), num_classes=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = SamplerGraph(spec, spec.build(), [80.0, 0.8])
    write_program(graph, tmp_path / "student.pt2")
    draw = torch.export.load(tmp_path / "student.pt2").module()
    for batch in (1, 3):
        inputs = graph.example(batch)
        with torch.no_grad():
            assert torch.equal(draw(*inputs), graph(*inputs))
