"""Distances against their formulas; LPIPS with weights the test makes, since the real ones are a download."""

import hashlib
import math

import pytest
import torch

from cm_core.distances import L1, L2, Lpips, PseudoHuber

SHAPE = (3, 32, 32)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, *SHAPE, generator=generator) for _ in range(2)]


def test_l1_and_l2_are_means_over_the_sample(pair):
    a, b = pair
    torch.testing.assert_close(L1().build(SHAPE)(a, b), (a - b).abs().mean((1, 2, 3)))
    torch.testing.assert_close(L2().build(SHAPE)(a, b), ((a - b) ** 2).mean((1, 2, 3)))


def test_pseudo_huber_takes_the_norm_of_the_whole_sample(pair):
    a, b = pair
    c = 0.00054 * math.sqrt(3 * 32 * 32)
    assert c == pytest.approx(0.02993, abs=5e-6)
    norm = (a - b).flatten(1).norm(dim=1)
    torch.testing.assert_close(PseudoHuber().build(SHAPE)(a, b), (norm**2 + c**2).sqrt() - c)


def test_pseudo_huber_gradient_norm_is_below_one_for_each_sample(pair):
    a, b = pair[0].requires_grad_(), pair[1]
    PseudoHuber().build(SHAPE)(a, b).sum().backward()
    norms = a.grad.flatten(1).norm(dim=1)
    assert (norms <= 1 + 1e-6).all() and (norms > 0.99).all()


@pytest.mark.parametrize("distance", [L1(), L2(), PseudoHuber()])
def test_distance_of_equal_images_is_zero(distance, pair):
    assert torch.equal(distance.build(SHAPE)(pair[0], pair[0]), torch.zeros(5))


@pytest.fixture(scope="session")
def vgg16(tmp_path_factory):
    """A VGG16 state dict of the right shapes with random values."""
    from cm_core.metrics.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from torchvision.models import vgg16 as build

    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.manual_seed(0)
    model = build(weights=None)
    torch.save({name: t for name, t in model.state_dict().items() if name.startswith("features")}, path)
    return path


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_lpips_loads_weights_and_is_frozen(vgg16, pair, pooling):
    a, b = pair[0][:2].requires_grad_(), pair[1][:2]
    distance = Lpips(pooling=pooling).build(SHAPE, vgg16)
    assert not any(p.requires_grad for p in distance.parameters())
    weights = torch.load(vgg16, weights_only=True)
    assert torch.equal(distance.lpips.net.slice5.state_dict()["28.weight"], weights["features.28.weight"])
    value = distance(a, b)
    assert value.shape == (2,) and (value > 0).all()
    torch.testing.assert_close(distance(a, a), torch.zeros(2))
    value.sum().backward()
    assert a.grad.abs().sum() > 0


def test_lpips_pooling_changes_the_value(vgg16, pair):
    a, b = pair[0][:1], pair[1][:1]
    values = [Lpips(pooling=pooling).build(SHAPE, vgg16)(a, b).item() for pooling in ("max", "avg")]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 8, 8)])
def test_lpips_refuses_images_it_cannot_judge(shape):
    with pytest.raises(ValueError, match="use l1, l2 or pseudo_huber"):
        Lpips().build(shape)


def test_lpips_checksum_must_be_a_sha256():
    with pytest.raises(ValueError, match="sha256"):
        Lpips(sha256="abc")
    Lpips(sha256=hashlib.sha256(b"").hexdigest())
