"""EDM2's layers preserve magnitudes: exactly what their formulas say, and unit variance for unit Gaussian inputs."""

import math

import pytest
import torch
import torch.nn.functional as F

from cm_core.networks import EDM2Params
from cm_core.networks.dropout import seed_dropout
from cm_core.networks.edm2 import Embedding, MPAttention, MPBlock
from cm_core.networks.layers import BoxUp
from cm_core.networks.magnitude import MPConv, force_norm, forced_weights, mp_cat, mp_silu, mp_sum, unit_rms

MANY = 1_000_000  # numbers of a sample: its variance is right to 0.3 % or so
SMALL = EDM2Params(channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=16)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def rms(x):
    return x.square().mean().sqrt().item()


def test_a_unit_rms_is_one_along_its_axes_alone():
    x = torch.randn(5, 16, 3, 3) * torch.rand(5, 1, 3, 3)
    found = unit_rms(x, 1)
    expected = x / (x.square().mean(1, keepdim=True).sqrt() + 1e-4)
    torch.testing.assert_close(found, expected)
    assert unit_rms(x.bfloat16(), 1).dtype == torch.bfloat16
    torch.testing.assert_close(unit_rms(torch.zeros(2, 4), 1), torch.zeros(2, 4))


def test_silu_sum_and_concatenation_have_unit_variance():
    a, b = torch.randn(MANY), torch.randn(MANY)
    assert rms(mp_silu(a)) == pytest.approx(1, abs=5e-3)
    assert rms(mp_sum(a, b, 0.3)) == pytest.approx(1, abs=5e-3)
    wide, narrow = torch.randn(100, 96, 10, 10), torch.randn(100, 16, 10, 10)
    both = mp_cat(wide, narrow)
    assert rms(both) == pytest.approx(1, abs=5e-3)
    # Each contributes half of the variance, whatever its width.
    assert both[:, :96].square().sum().item() == pytest.approx(both[:, 96:].square().sum().item(), rel=1e-2)


def test_the_silus_gain_is_the_exact_one():
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    assert torch.trapezoid(F.silu(z).square() * density, z).sqrt().item() == pytest.approx(0.596, abs=5e-4)


@pytest.mark.parametrize("kernel, shape", [(0, (4000, 64)), (1, (16, 64, 16, 16)), (3, (16, 64, 16, 16))])
def test_a_layer_keeps_unit_variance_whatever_the_length_of_its_weights(kernel, shape):
    layer, x = MPConv(64, 64, kernel), torch.randn(shape)
    with torch.no_grad():
        layer.weight *= torch.logspace(-2, 2, 64).reshape(-1, *[1] * (layer.weight.ndim - 1))
        out = layer(x)
    inner = out[..., 1:-1, 1:-1] if kernel == 3 else out  # padding adds zeros at the border
    assert rms(inner) == pytest.approx(1, rel=2e-2)
    dims = [0, *range(2, out.ndim)]
    assert inner.square().mean(dims).sqrt().sub(1).abs().max() < 0.1  # every channel by itself


def test_a_gain_scales_the_output_and_starts_at_zero():
    layer, x = MPConv(8, 8, 0, gain=True), torch.randn(4, 8)
    assert not layer(x).any()
    plain = MPConv(8, 8, 0)
    plain.weight, layer.gain.data[0] = layer.weight, 0.7
    torch.testing.assert_close(layer(x), 0.7 * plain(x))


def test_forced_weights_are_those_of_all_layers_and_have_unit_rows():
    net = SMALL.build((1, 8, 8), num_classes=3)
    weights = list(forced_weights(net))
    assert {id(w) for w in weights} == {id(p) for name, p in net.named_parameters() if name.endswith("weight")}
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    net.unet.output.gain.data.fill_(1.0)
    before = net(x, torch.zeros(2), labels)
    for weight in weights:
        force_norm(weight)
        torch.testing.assert_close(weight.flatten(1).square().mean(1), torch.ones(len(weight)), rtol=1e-2, atol=0)
    torch.testing.assert_close(net(x, torch.zeros(2), labels), before, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("module", [BoxUp(), MPAttention(64, 32)], ids=["up", "attention"])
def test_parts_keep_about_unit_variance(module):
    with torch.no_grad():
        assert rms(module(torch.randn(8, 64, 8, 8))) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("changes", [{}, {"embedding": "positional"}], ids=["fourier", "positional"])
def test_the_embedding_has_unit_variance_with_and_without_augmentation(changes):
    params = SMALL.model_copy(update={"channels": 256, **changes})
    with torch.no_grad():
        noise = torch.linspace(0, 1.6, 64)
        found = Embedding(params, 1024, 10, 0, False)(noise, torch.arange(64) % 10, None)
        features = (
            math.sqrt(2) * (noise[:, None] * (e := Embedding(params, 1024, 0, 0, False)).frequencies + e.phases).cos()
        )
    assert rms(features) == pytest.approx(1, abs=0.1)
    assert rms(found) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("encodes", [True, False])
@pytest.mark.parametrize("double_norm", [True, False])
def test_a_block_equals_its_formula(encodes, double_norm):
    params = SMALL.model_copy(update={"double_norm": double_norm})
    block = MPBlock(params, 16, 32, 64, encodes=encodes, resample="down").eval()
    block.modulation.gain.data.fill_(0.5)
    x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
    main = F.avg_pool2d(x, 2)
    if encodes:
        main = block.skip(main)
        main = main / (main.square().mean(1, keepdim=True).sqrt() + 1e-4)
    h = block.conv0(F.silu(main) / 0.596)
    factor = 1 + block.modulation(emb)
    if double_norm:
        factor = factor / (factor.square().mean(1, keepdim=True).sqrt() + 1e-4)
    h = block.conv1(F.silu(h * factor[:, :, None, None]) / 0.596)
    main = main if encodes else block.skip(main)
    torch.testing.assert_close(block(x, emb), (0.7 * main + 0.3 * h) / math.sqrt(0.58), rtol=1e-4, atol=1e-5)


def test_activations_are_clipped():
    block = MPBlock(SMALL, 16, 16, 64, encodes=False)
    out = block(1e6 * torch.randn(2, 16, 4, 4), torch.randn(2, 64))
    assert out.abs().max() == 256


def test_attention_is_of_unit_vectors():
    attention, x = MPAttention(32, 16), torch.randn(2, 32, 4, 4)
    qkv = attention.qkv(x).reshape(2, 3, 2, 16, 16)  # [B, 3, heads, C / heads, H * W]
    q, k, v = (t / (t.square().mean(2, keepdim=True).sqrt() + 1e-4) for t in qkv.unbind(1))
    weights = torch.einsum("bhcq,bhck->bhqk", q, k / 4).softmax(dim=-1)
    out = attention.proj(torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape))
    torch.testing.assert_close(attention(x), (0.7 * x + 0.3 * out) / math.sqrt(0.58), rtol=1e-4, atol=1e-5)


def test_the_network_keeps_unit_variance_from_end_to_end():
    params = EDM2Params(channels=32, channel_mult=(1, 2), num_blocks=2, attn_resolutions=(8,), channels_per_head=32)
    net = params.build((3, 16, 16), num_classes=0).eval()
    net.unet.output.gain.data.fill_(1.0)
    with torch.no_grad():
        assert rms(net(torch.randn(16, 3, 16, 16), torch.randn(16))) == pytest.approx(1, abs=0.2)


def test_positional_features_are_slower_than_random_ones():
    """The derivative of a feature with respect to the noise level is its frequency."""
    slow, fast = (
        Embedding(SMALL.model_copy(update={"embedding": kind, "channels": 256}), 16, 0, 0, False).frequencies.max()
        for kind in ("positional", "fourier")
    )
    assert slow == 1 and fast > 10


def test_dropout_is_the_projects_own():
    net = SMALL.model_copy(update={"dropout": 0.5}).build((1, 8, 8), num_classes=0).train()
    net.unet.output.gain.data.fill_(1.0)
    x, outs = torch.randn(2, 1, 8, 8), []
    for seed in (1, 1, 2):
        seed_dropout(seed, torch.device("cpu"))
        outs.append(net(x, torch.zeros(2)))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
