"""Distances against their formulas; LPIPS with weights the test makes, since the real ones are a download."""

import hashlib
import math
import urllib.error

import pytest
import torch
import torch.nn.functional as F

from cm_core.distances import Lpips, Pixelwise, PseudoHuber, check_lpips_shape, pseudo_huber

SHAPE = (3, 32, 32)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, *SHAPE, generator=generator) for _ in range(2)]


def test_l1_and_l2_are_means_over_the_sample(pair):
    a, b = pair
    torch.testing.assert_close(Pixelwise(kind="l1").build(SHAPE)(a, b), (a - b).abs().mean((1, 2, 3)))
    torch.testing.assert_close(Pixelwise().build(SHAPE)(a, b), ((a - b) ** 2).mean((1, 2, 3)))


def test_pseudo_huber_takes_the_norm_of_the_whole_sample(pair):
    a, b = pair
    c = 0.00054 * math.sqrt(3 * 32 * 32)
    assert c == pytest.approx(0.02993, abs=5e-6)
    norm = (a - b).flatten(1).norm(dim=1)
    torch.testing.assert_close(PseudoHuber().build(SHAPE)(a, b), (norm**2 + c**2).sqrt() - c)


def test_pseudo_huber_values():
    a, b = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 12.0]])
    assert pseudo_huber(a, b, c=4.0).tolist() == [1, pytest.approx(160**0.5 - 4)]
    of_shape = PseudoHuber(c_per_sqrt_dim=2.0).build((1, 2, 2))  # c = 2 sqrt(4)
    assert of_shape(torch.full((1, 1, 2, 2), 1.5), torch.zeros(1, 1, 2, 2)).tolist() == [1]


def test_pseudo_huber_gradient_norm_is_below_one_for_each_sample(pair):
    a, b = pair[0].requires_grad_(), pair[1]
    PseudoHuber().build(SHAPE)(a, b).sum().backward()
    norms = a.grad.flatten(1).norm(dim=1)
    assert (norms <= 1 + 1e-6).all() and (norms > 0.99).all()


@pytest.mark.parametrize("distance", [Pixelwise(kind="l1"), Pixelwise(), PseudoHuber()])
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


@pytest.fixture(scope="session")
def lpips(vgg16):
    """LPIPS by pooling, on images as they are; building VGG16 takes seconds."""
    return {pooling: Lpips(pooling=pooling, resize_below=32).build(SHAPE, vgg16) for pooling in ("max", "avg")}


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_lpips_loads_weights_and_is_frozen(lpips, vgg16, pair, pooling):
    a, b = pair[0][:2].requires_grad_(), pair[1][:2]
    distance = lpips[pooling]
    assert not any(p.requires_grad for p in distance.parameters()) and not distance.lpips.training
    weights = torch.load(vgg16, weights_only=True)
    assert torch.equal(distance.lpips.net.slice5.state_dict()["28.weight"], weights["features.28.weight"])
    value = distance(a, b)
    assert value.shape == (2,) and (value > 0).all()
    torch.testing.assert_close(distance(a, a), torch.zeros(2))
    value.sum().backward()
    assert a.grad.abs().sum() > 0


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_lpips_is_the_papers_formula_on_images_in_minus_one_to_one(lpips, vgg16, pair, pooling):
    """LPIPS, eq. 1: squared differences of VGG's features, normalised over channels and weighted, averaged by layer."""
    images = [x[:2].clamp(-1, 1).double() for x in pair]
    weights, distance = torch.load(vgg16, weights_only=True), lpips[pooling]
    expected = torch.zeros(2, dtype=torch.float64)
    for stage, found in enumerate(zip(*(vgg_features(x, weights, pooling) for x in images), strict=True)):
        a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in found)
        learned = distance.lpips.get_submodule(f"lin{stage}.model.1").weight.double()
        expected += F.conv2d((a - b).square(), learned).mean((1, 2, 3))
    found = distance(*(x.float() for x in images))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(*images), found), "LPIPS is in float32 under autocast, whatever the images are in"


def vgg_features(x, weights, pooling):
    """Return VGG16's activations at the end of its five stages, [B, C, H, W] each, for images in -1..1."""
    mean, std = (torch.tensor(v)[None, :, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    # The statistics of ImageNet as LPIPS has them, rounded to three places for images in -1..1.
    x = (x - (2 * mean - 1).mul(1e3).round().div(1e3)) / (2 * std).mul(1e3).round().div(1e3)
    found = []
    for first, convolutions in ((0, 2), (5, 2), (10, 3), (17, 3), (24, 3)):
        if found:
            x = (F.max_pool2d if pooling == "max" else F.avg_pool2d)(x, 2)
        for layer in range(first, first + 2 * convolutions, 2):
            kernel, bias = (weights[f"features.{layer}.{kind}"].double() for kind in ("weight", "bias"))
            x = F.conv2d(x, kernel, bias, padding=1).relu()
        found.append(x)
    return found


@pytest.mark.parametrize(("size", "asked"), [((31, 32), (224, 224)), ((32, 32), (32, 32)), ((40, 33), (40, 33))])
def test_lpips_enlarges_small_images(lpips, monkeypatch, size, asked):
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, a, b):
            seen.extend((a, b))
            return (a - b).mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(lpips["max"]._modules, "lpips", Spy())
    a, b = torch.randn(2, 2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert lpips["max"](a, b).shape == (2,)
    for image, found in zip((a, b), seen, strict=True):
        expected = F.interpolate(image, size=asked, mode="bilinear", align_corners=False)
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if size == asked else 1e-6)


def test_lpips_without_a_download_says_what_to_do(monkeypatch):
    import lpips as package

    def offline(**_):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(package, "LPIPS", offline)
    with pytest.raises(FileNotFoundError, match=r"download failed .*no network.*: set distance\.weights to a path"):
        Lpips().build(SHAPE)


def test_lpips_takes_torchvisions_weights_if_none_are_named(monkeypatch):
    import lpips as package

    asked = []
    monkeypatch.setattr("cm_core.metrics.torchvision_shim.ensure_torchvision", lambda: asked.append("torchvision"))
    monkeypatch.setattr(package, "LPIPS", lambda **options: asked.append(options) or torch.nn.Linear(1, 1))
    Lpips().build(SHAPE)
    assert asked == ["torchvision", {"net": "vgg", "verbose": False}]


@pytest.mark.parametrize("shape", [(1, 32, 32), (4, 32, 32), (3, 8, 8), (3, 15, 16), (3, 16, 15)])
def test_lpips_refuses_images_it_cannot_judge(shape):
    with pytest.raises(ValueError, match="use l1, l2 or pseudo_huber"):
        check_lpips_shape(shape)
    check_lpips_shape((3, 16, 16))


def test_lpips_checksum_must_be_a_sha256():
    with pytest.raises(ValueError, match="sha256"):
        Lpips(sha256="abc")
    Lpips(sha256=hashlib.sha256(b"").hexdigest())
