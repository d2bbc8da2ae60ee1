import math

import pytest
import torch

from cm_core.precond import Precond
from oracles import ConstantNet

VECTORS = [  # sigma, EDM c_skip, EDM c_out, c_in, ln(sigma)/4, CM c_skip, CM c_out
    (0.002, 0.999984, 0.001999984, 1.999984, -1.553652, 1, 0),
    (0.1, 0.96153846, 0.098058068, 1.9611614, -0.57564627, 0.96300519, 0.096096906),
    (0.5, 0.5, 0.35355339, 1.4142136, -0.1732868, 0.502004, 0.35213918),
    (1, 0.2, 0.4472136, 0.89442719, 0, 0.20064141, 0.44631917),
    (80, 3.9060974e-05, 0.49999023, 0.012499756, 1.0955067, 3.9062927e-05, 0.49997773),
]


@pytest.mark.parametrize("vector", VECTORS)
def test_scalings_match_the_printed_vectors(vector):
    sigma, edm_skip, edm_out, c_in, c_noise, cm_skip, cm_out = vector
    at = torch.tensor([sigma], dtype=torch.float64)
    denoiser = Precond(ConstantNet(), sigma_min=0.0, sigma_data=0.5)
    edm = (*denoiser.scalings(at), denoiser.noise_labels(at))
    cm = Precond(ConstantNet(), sigma_min=0.002, sigma_data=0.5).scalings(at)
    for found, expected in zip((*edm, *cm[:2]), (edm_skip, edm_out, c_in, c_noise, cm_skip, cm_out), strict=True):
        assert found.item() == pytest.approx(expected, rel=5e-7, abs=1e-12)


@pytest.mark.parametrize("piecewise", [False, True])
def test_boundary_is_exact_to_the_bit(piecewise):
    f = Precond(ConstantNet(), sigma_min=0.002, sigma_data=0.5, piecewise=piecewise)
    x = torch.randn(64, 3, 8, 8) * 10
    assert torch.equal(f(x, torch.full((64,), 0.002)), x)
    assert not torch.equal(f(x, torch.full((64,), 0.003)), x)


def test_piecewise_form_is_the_bare_network_away_from_the_boundary():
    net = ConstantNet()
    f = Precond(net, sigma_min=0.002, sigma_data=0.5, piecewise=True)
    x, t = torch.randn(4, 1, 2, 2), torch.full((4,), 2.0)
    c_in = 1 / (t**2 + 0.25).sqrt()
    torch.testing.assert_close(f(x, t), net(c_in[:, None, None, None] * x, t.log() / 4, None, None))


def test_network_sees_unit_variance():
    seen = []
    net = ConstantNet()
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].std().item()))
    f = Precond(net, sigma_min=0.0, sigma_data=0.5)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(2000, 3, 4, 4, generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    for sigma in (0.01, 0.5, 20.0):
        f(x0 + sigma * eps, torch.full((2000,), sigma))
    assert seen == pytest.approx([1, 1, 1], abs=0.01)


def test_half_precision_stays_inside_the_network():
    f = Precond(torch.nn.Identity(), sigma_min=0.002, sigma_data=0.5, autocast=torch.bfloat16)
    f.net = ConstantNet()
    x = torch.randn(4, 1, 2, 2)
    out = f(x, torch.full((4,), 0.002))
    assert out.dtype == torch.float32 and torch.equal(out, x)


class Spy(torch.nn.Module):
    """Returns a fixed image, and writes down what it was asked and under which autocast."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, c_noise, labels, augment_labels):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.asked.append((x, c_noise, labels, augment_labels, dtype))
        return torch.full_like(x, 0.5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_network_gets_scaled_images_noise_labels_and_both_conditions(dtype):
    net, x, sigma = Spy(), torch.ones(2, 1, 1, 1), torch.tensor([0.5, 2.0])
    f = Precond(net, sigma_min=0.1, sigma_data=0.5, noise_scale=1000.0, autocast=dtype)
    labels, augment_labels = torch.tensor([3, 4]), torch.ones(2, 9)
    out = f(x, sigma, labels, augment_labels)
    ((x_in, c_noise, *conditions, autocast),) = net.asked
    assert autocast == dtype and conditions[0] is labels and conditions[1] is augment_labels
    assert x_in.flatten().tolist() == pytest.approx([2**0.5, 4.25**-0.5])
    assert c_noise.tolist() == pytest.approx([250 * math.log(0.5), 250 * math.log(2)])
    expected = [0.25 / (d**2 + 0.25) + 0.5 * d / (s**2 + 0.25) ** 0.5 * 0.5 for s, d in ((0.5, 0.4), (2.0, 1.9))]
    assert out.flatten().tolist() == pytest.approx(expected)
    f(x, sigma)
    assert net.asked[1][2:4] == (None, None)


def test_a_raw_output_has_the_type_of_its_input():
    f = Precond(torch.nn.Bilinear(1, 1, 1), sigma_min=0.0, sigma_data=0.5, autocast=torch.bfloat16)
    f.network_pass = lambda x, *_: x.bfloat16()
    assert f.raw(torch.ones(2, 1, dtype=torch.float64), torch.ones(2)).dtype == torch.float64


def test_a_trainings_wrapper_replaces_the_network():
    net, x = Spy(), torch.ones(2, 1, 1, 1)
    f = Precond(net, sigma_min=0.0, sigma_data=0.5)
    f.network_pass = lambda x, *conditions: 3 * x
    assert torch.equal(f.raw(x, torch.ones(2)), 3 * x) and net.asked == []


def test_the_piecewise_form_is_the_image_at_and_below_the_boundary():
    f = Precond(ConstantNet(), sigma_min=0.25, sigma_data=0.5, piecewise=True)
    skip, out, _ = f.scalings(torch.tensor([0.125, 0.25, 0.2501, 80.0]))
    assert skip.tolist() == [1, 1, 0, 0] and out.tolist() == [0, 0, 1, 1] and skip.dtype == torch.float32


def test_angles_of_trigflow_scale_too():
    f = Precond(ConstantNet(), sigma_min=0.0, sigma_data=0.5, c_noise="angle", noise_scale=2.0)
    assert f.noise_labels(torch.tensor([0.5, 1.0])).tolist() == pytest.approx([math.pi / 2, 2 * math.atan(2)])
