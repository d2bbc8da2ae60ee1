"""The networks are the published ones, and their conditioning, layouts and derivatives are right."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import nn

from cm_core.networks import DhariwalUNetParams, EDM2Params, MLPParams, Network, SongUNetParams, blocks
from cm_core.networks.blocks import ResidualBlock
from cm_core.networks.dropout import seed_dropout
from cm_core.networks.fir import FirDown, FirUp
from cm_core.networks.layers import Attention, BoxDown, BoxUp, group_norm, pyramid_input
from cm_core.networks.modes import derivative, forward_mode

NCSNPP = {"fourier_scale": 16, "encoder": "residual", "resample_filter": "fir"}
DIGITS = {"channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
SMALL = {
    "ddpmpp": SongUNetParams(**DIGITS),
    "ncsnpp": SongUNetParams(**DIGITS, **NCSNPP),
    "adm": DhariwalUNetParams(**DIGITS, channels_per_head=16),
    "adm_added": DhariwalUNetParams(**DIGITS, channels_per_head=16, scale_shift=False),
    "adm_scm": DhariwalUNetParams(**DIGITS, channels_per_head=16, double_norm=True),
    "edm2": EDM2Params(**DIGITS, channels_per_head=16),
    "edm2_scm": EDM2Params(**DIGITS, channels_per_head=16, embedding="positional", double_norm=True),
    "mlp": MLPParams(width=32, depth=2),
}


def randomise(net: nn.Module) -> nn.Module:
    """Give every parameter a visible part in the output: residual branches start near zero."""
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator) if p.numel() > 1 else 1.0  # EDM2's gains
    return net


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.fixture
def net(name):
    return build(name, seed=0)


def build(name, *, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(SMALL[name].build((1, 8, 8), num_classes=10, augment_dim=9)).eval()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(2)
    x, noise_labels = torch.randn(4, 1, 8, 8, generator=g), torch.linspace(-1.5, 1, 4)
    return x, noise_labels, torch.tensor([0, 9, 3, 3]), torch.randn(4, 9, generator=g)


@pytest.mark.parametrize(
    "params, image_shape, num_classes, augment_dim, expected",
    [
        (SongUNetParams(), (3, 32, 32), 0, 0, 55_732_739),
        (SongUNetParams(), (3, 32, 32), 0, 9, 55_733_891),
        (SongUNetParams(), (3, 32, 32), 10, 9, 55_735_299),
        (SongUNetParams(channel_mult=(1, 2, 2, 2)), (3, 64, 64), 0, 9, 61_805_571),
        (SongUNetParams(**NCSNPP), (3, 32, 32), 0, 0, 56_395_523),
        (SongUNetParams(**NCSNPP), (3, 32, 32), 0, 9, 56_397_827),
        (SongUNetParams(**NCSNPP), (3, 32, 32), 10, 9, 56_400_643),
        (DhariwalUNetParams(), (3, 64, 64), 1000, 0, 295_899_267),
        (
            DhariwalUNetParams(channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_blocks=2, scale_shift=False),
            (3, 256, 256),
            0,
            0,
            526_304_771,
        ),
        # Published with the learned weight of the loss, 128 numbers, which is no part of the network here.
        (EDM2Params(), (3, 64, 64), 1000, 0, 280_209_381 - 128),
        (EDM2Params(channels=256), (3, 64, 64), 1000, 0, 497_803_173 - 128),
        (EDM2Params(channels=320), (3, 64, 64), 1000, 0, 777_492_325 - 128),
        (EDM2Params(channels=384), (3, 64, 64), 1000, 0, 1_119_276_837 - 128),
        (EDM2Params(channels=128), (4, 64, 64), 1000, 0, 124_713_125),  # XS, 124.7 M on latents
        (EDM2Params(), (4, 64, 64), 1000, 0, 280_212_709),  # S, 280.2 M
    ],
)
def test_published_parameter_counts(params, image_shape, num_classes, augment_dim, expected):
    with torch.device("meta"):
        net = params.build(image_shape, num_classes, augment_dim)
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("params", [SongUNetParams(), SongUNetParams(**NCSNPP), DhariwalUNetParams(), EDM2Params()])
@pytest.mark.parametrize("image_shape", [(3, 64, 64), (1, 32, 16)])
def test_output_has_the_shape_of_the_input(params, image_shape):
    with torch.device("meta"):
        out = params.build(image_shape, num_classes=0)(torch.empty(2, *image_shape), torch.empty(2))
    assert out.shape == (2, *image_shape)


def test_mlp_takes_samples_of_any_shape():
    for shape in [(2,), (3,), (1, 8, 8)]:
        net = randomise(MLPParams(width=8, depth=1).build(shape, num_classes=0))
        out = net(torch.zeros(5, *shape), torch.linspace(-1, 1, 5))
        assert out.shape == (5, *shape)
        assert out.std(dim=0).min() > 0  # the noise level matters


def test_output_starts_near_zero(name, inputs):
    out = SMALL[name].build((1, 8, 8), num_classes=0)(*inputs[:2])
    assert out.abs().max() < 1e-3


def test_every_parameter_has_a_gradient(net, inputs):
    net(*inputs).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_conditioning_changes_the_output(net, inputs):
    x, noise_labels, class_labels, augment_labels = inputs
    out = net(*inputs)
    assert not torch.allclose(out, net(x, noise_labels + 0.1, class_labels, augment_labels), atol=1e-4)
    assert not torch.allclose(out, net(x, noise_labels, class_labels - 1, augment_labels), atol=1e-4)
    assert not torch.allclose(out, net(x, noise_labels, class_labels, augment_labels + 1), atol=1e-4)


def test_label_minus_one_is_no_label(net, inputs):
    x, noise_labels, class_labels, _ = inputs
    none = torch.full_like(class_labels, -1)
    torch.testing.assert_close(net(x, noise_labels, none), net(x, noise_labels), rtol=0, atol=0)
    mixed = torch.tensor([0, -1, 3, -1])
    rows = net(x, noise_labels, mixed)
    torch.testing.assert_close(rows[[1, 3]], net(x, noise_labels)[[1, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows[[0, 2]], net(x, noise_labels, class_labels)[[0, 2]], rtol=1e-5, atol=1e-5)


def test_no_augmentation_equals_zero_labels(net, inputs):
    x, noise_labels, class_labels, augment_labels = inputs
    zeros = torch.zeros_like(augment_labels)
    torch.testing.assert_close(net(x, noise_labels, class_labels, zeros), net(x, noise_labels, class_labels))


def test_unconditional_networks_ignore_class_labels(name, inputs):
    x, noise_labels, class_labels, _ = inputs
    net = randomise(SMALL[name].build((1, 8, 8), num_classes=0)).eval()
    assert torch.equal(net(x, noise_labels, class_labels), net(x, noise_labels))


def test_a_label_beyond_the_classes_is_refused(net, inputs):
    x, noise_labels, *_ = inputs
    with pytest.raises(RuntimeError, match="out of bounds"):
        net(x, noise_labels, torch.full((4,), 10))


def test_augment_labels_need_a_network_built_for_them(inputs):
    x, noise_labels, _, augment_labels = inputs
    with pytest.raises(ValueError, match="augment_dim=0"):
        SMALL["ddpmpp"].build((1, 8, 8), num_classes=0)(x, noise_labels, None, augment_labels)


def noise_features(params, noise_label):
    """Return the input of the first layer of the embedding."""
    embed, seen = params.build((1, 8, 8), num_classes=0).embed, []
    embed.layer0.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    embed(torch.tensor([noise_label]), None, None)
    return seen[0][0]


def test_positional_features_of_ddpmpp_start_with_the_sine():
    angles = 0.5 * torch.tensor([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])  # end point included
    features = noise_features(SongUNetParams(channels=8), 0.5)
    torch.testing.assert_close(features, torch.cat([angles.sin(), angles.cos()]))


def test_positional_features_of_adm_start_with_the_cosine():
    angles = 0.5 * torch.tensor([1, 0.1, 0.01, 0.001])  # end point excluded
    features = noise_features(DhariwalUNetParams(channels=8, channels_per_head=8), 0.5)
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()]))


@pytest.mark.parametrize("scale", [16, 0.02])
def test_fourier_frequencies_have_the_given_scale_and_travel_with_the_weights(scale):
    params = SongUNetParams(channels=128, channel_mult=(1,), num_blocks=1, fourier_scale=scale)
    weights = params.build((1, 8, 8), num_classes=0).state_dict()
    assert weights["embed.frequencies"].std() == pytest.approx(2 * torch.pi * scale, rel=0.2)
    assert len(noise_features(params, 0.5)) == 2 * 128


@pytest.mark.parametrize("down, up", [(BoxDown(), BoxUp()), (FirDown(), FirUp())])
def test_resampling_keeps_constants_and_places(down, up):
    ramp = torch.arange(16.0).expand(1, 3, 16, 16)  # value = x coordinate
    torch.testing.assert_close(
        down(ramp)[..., 1:-1, 1:-1], (torch.arange(8.0) * 2 + 0.5).expand(1, 3, 8, 8)[..., 1:-1, 1:-1]
    )
    interior = up(torch.ones(1, 3, 8, 8))[..., 1:-1, 1:-1]
    torch.testing.assert_close(interior, torch.ones_like(interior))


def test_fir_resampling_up_is_the_adjoint_of_down():
    x, y = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 4, 4)
    torch.testing.assert_close((FirDown()(x) * y).sum(), (x * FirUp()(y)).sum() / 4)


@pytest.mark.parametrize("resample_filter", ["box", "fir"])
def test_pyramid_halves_and_keeps_constants(resample_filter):
    pyramid = pyramid_input(1, 1, resample_filter)
    nn.init.constant_(pyramid.conv.weight, 1 / 9)
    nn.init.zeros_(pyramid.conv.bias)
    out = pyramid(torch.ones(1, 1, 8, 8))
    assert out.shape == (1, 1, 4, 4)
    torch.testing.assert_close(out[..., 1:-1, 1:-1], torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("channels, groups", [(128, 32), (1024, 32), (32, 8), (48, 12), (144, 24), (4, 1)])
def test_group_norm_has_at_least_four_channels_a_group(channels, groups):
    assert group_norm(channels, eps=1e-6).num_groups == groups


@pytest.mark.parametrize(
    "name, scale, eps",
    [("ddpmpp", 0.5**0.5, 1e-6), ("adm", 1.0, 1e-5), ("adm_added", 1.0, 1e-5), ("adm_scm", 1.0, 1e-5)],
)
def test_block_equals_its_formula(name, net, scale, eps):
    block = net.unet.encoder["level1_down"]
    x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
    params = block.affine(emb)[..., None, None]

    def norm(layer, h):
        return F.group_norm(h, 4, layer.weight, layer.bias, eps)

    h = block.conv0(F.avg_pool2d(F.silu(norm(block.norm0, x)), 2))
    if name == "adm":
        h = norm(block.norm1, h) * (1 + params[:, :16]) + params[:, 16:]
    elif name == "adm_scm":
        factor, shift = 1 + params[:, :16], params[:, 16:]
        factor, shift = (part / (part.square().mean(1, keepdim=True).sqrt() + 1e-4) for part in (factor, shift))
        h = norm(block.norm1, h) * factor + shift
    else:
        h = norm(block.norm1, h + params)
    skip = F.avg_pool2d(x, 2)
    if name == "ddpmpp":  # resampling blocks of the Song U-Net have a projection on their skip path
        skip = block.skip(skip)
    torch.testing.assert_close(block(x, emb), (skip + block.conv1(F.silu(h))) * scale, rtol=1e-4, atol=1e-5)


def test_the_pyramid_joins_each_resolution_and_carries_on_from_there(inputs):
    params = SongUNetParams(channels=16, channel_mult=(1, 1, 1), num_blocks=1, **NCSNPP)
    net = randomise(params.build((1, 8, 8), num_classes=0))
    unet, seen = net.unet, {}
    for name, module in unet.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    net(*inputs[:2])
    joined = (seen["encoder.level1_down"][1] + seen["pyramid.level1_down"][1]) / 2**0.5
    torch.testing.assert_close(seen["pyramid.level1_down"][0], inputs[0])
    torch.testing.assert_close(seen["encoder.level1_block0"][0], joined)
    torch.testing.assert_close(seen["pyramid.level2_down"][0], joined)


@pytest.mark.parametrize("name, heads, scale", [("ddpmpp", 1, 0.5**0.5), ("adm", 2, 1.0)])
def test_attention_equals_its_formula(name, net, heads, scale):
    attention = net.unet.middle[0].attention
    x, width = torch.randn(2, 32, 4, 4), 32 // heads
    qkv = attention.qkv(attention.norm(x)).reshape(2, 3, heads, width, 16)  # [B, 3, heads, C / heads, H * W]
    q, k, v = qkv.unbind(1)
    weights = torch.einsum("bhcq,bhck->bhqk", q, k / width**0.5).softmax(dim=-1)
    out = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(x.shape)
    torch.testing.assert_close(attention(x), (x + attention.proj(out)) * scale, rtol=1e-4, atol=1e-5)


def test_forward_mode_computes_the_same(net, inputs):
    out = net(*inputs)
    with forward_mode():
        torch.testing.assert_close(net(*inputs), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_forward_mode_derivative_equals_central_differences(net, inputs, with_gradients):
    net.double()
    x, noise_labels, class_labels, _ = inputs
    primals = x.double(), noise_labels.double()
    tangents = torch.randn_like(primals[0]), torch.randn_like(primals[1])

    def f(x, noise_labels):
        return net(x, noise_labels, class_labels)

    with torch.set_grad_enabled(with_gradients):
        out, tangent = derivative(f, primals, tangents)
    if with_gradients:
        gradients = torch.autograd.grad(tangent.square().sum(), net.parameters(), retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    else:
        assert not (out.requires_grad or tangent.requires_grad)
    h = 1e-7  # small: NCSN++ has frequencies of some hundreds
    ahead = f(*(p + h * t for p, t in zip(primals, tangents, strict=True)))
    behind = f(*(p - h * t for p, t in zip(primals, tangents, strict=True)))
    torch.testing.assert_close(out, f(*primals))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"mlp"}))
def test_channels_last_computes_the_same_and_stays_channels_last(net, inputs):
    out = net(*inputs)
    net.to(memory_format=torch.channels_last)
    layouts = []
    for module in net.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda _, args, y: layouts.append(is_channels_last(args[0], y)))
    x = inputs[0].to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x, *inputs[1:]), out, rtol=1e-4, atol=1e-5)
    assert layouts and all(layouts)


def is_channels_last(*tensors):
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


def test_bfloat16_autocast_stays_close(net, inputs):
    out = net(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(*inputs)
    assert (low.float() - out).norm() < 0.05 * out.norm()


def test_networks_compile_as_one_graph(net, inputs):
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), net(*inputs))


def test_state_dict_restores_the_function(name, net, inputs):
    other = build(name, seed=3)
    assert not torch.equal(other(*inputs), net(*inputs))
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(*inputs), net(*inputs), rtol=0, atol=0)


def test_dropout_masks_can_be_shared(inputs):
    net = randomise(SongUNetParams(**DIGITS, dropout=0.5).build((1, 8, 8), num_classes=0)).train()
    cpu = torch.device("cpu")
    outs = []
    for seed in (1, 1, 2):
        seed_dropout(seed, cpu)
        outs.append(net(*inputs[:2]))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(net.eval()(*inputs[:2]), net(*inputs[:2]))


@pytest.mark.parametrize("unet", [name for name in SMALL if name != "mlp"])
@pytest.mark.parametrize(("limit", "heights"), [(None, {8, 4}), (8, {8, 4}), (4, {4}), (2, set())])
def test_dropout_can_be_confined_to_coarse_resolutions(unet, limit, heights, monkeypatch, inputs):
    seen = set()
    monkeypatch.setattr(blocks, "dropout", lambda h, p, *, layer: seen.add(h.shape[2]) or h)
    params = SMALL[unet].model_copy(update={"dropout": 0.5, "dropout_resolution": limit})
    params.build((1, 8, 8), num_classes=0).train()(*inputs[:2])
    assert seen == heights


def test_every_block_is_reached_by_name():
    names = dict(SMALL["ncsnpp"].build((1, 8, 8), num_classes=0).unet.named_children())
    assert list(names["encoder"]) == ["level0_block0", "level1_down", "level1_block0"]
    assert list(names["decoder"]) == ["level1_block0", "level1_block1", "level0_up", "level0_block0", "level0_block1"]
    assert list(names["pyramid"]) == ["level1_down"]


def test_attention_sits_where_the_papers_have_it():
    def attending(params, size):
        with torch.device("meta"):
            unet = params.build((3, size, size), num_classes=0).unet
        return [name for name, m in unet.named_modules() if isinstance(m, Attention)]

    assert attending(SongUNetParams(num_blocks=2), 32) == [
        "encoder.level1_block0.attention",
        "encoder.level1_block1.attention",
        "middle.0.attention",
        "decoder.level1_block2.attention",
    ]
    adm = attending(DhariwalUNetParams(num_blocks=1, attn_resolutions=(8,)), 64)
    assert adm == [
        "encoder.level3_block0.attention",
        "middle.0.attention",
        "decoder.level3_block0.attention",
        "decoder.level3_block1.attention",
    ]


@pytest.mark.parametrize(
    "params, image_shape, words",
    [
        (SongUNetParams(channel_mult=(1, 2, 2, 2, 2)), (1, 8, 8), "5 entries in channel_mult .* 8x8 .* 16"),
        (SongUNetParams(channel_mult=(1, 2, 2)), (3, 30, 30), "30x30 is not divisible by 4"),
        (DhariwalUNetParams(), (3, 64, 60), "dhariwal_unet: .* 64x60"),
        (DhariwalUNetParams(channels=32), (3, 32, 32), "channels_per_head is 64, .* 32 channels"),
        (SongUNetParams(), (32, 32), "image_shape"),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(params, image_shape, words):
    with pytest.raises(ValueError, match=words) as error:
        params.build(image_shape, num_classes=0)
    assert "\n" not in str(error.value)


def test_the_union_is_chosen_by_kind():
    adapter = TypeAdapter(Network)
    classes = {"song_unet": SongUNetParams, "dhariwal_unet": DhariwalUNetParams, "edm2": EDM2Params, "mlp": MLPParams}
    for kind, cls in classes.items():
        assert type(adapter.validate_python({"kind": kind})) is cls


@pytest.mark.parametrize("cls", [SongUNetParams, DhariwalUNetParams, EDM2Params, MLPParams])
def test_every_field_is_described(cls):
    assert [name for name, field in cls.model_fields.items() if not field.description] == []
