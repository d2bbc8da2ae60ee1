"""Losses of the authors' own code on the same weights, images and noise: numbers alone.

Computed once, by running NVlabs/edm, locuslab/ect and openai/consistency_models with the raw network below; sCM's
tangent, whose authors published no code, by running xandergos/sCM-mnist.
"""

import pytest
import torch
from torch import nn

from cm_core.distances import Pixelwise, PseudoHuber
from cm_core.methods.base import Batch, Models
from cm_core.methods.cd import CD
from cm_core.methods.ct import CT
from cm_core.methods.ect import ECT
from cm_core.methods.edm import EDM
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.precond import Precond
from method_oracles import NOISE, context

COUNT = torch.arange(6 * 12, dtype=torch.float64).reshape(6, 3, 2, 2)
X0, EPS = 0.5 * (1.3 * COUNT).sin(), 1.4 * (0.7 * COUNT + 1).cos()
NORMALS = torch.linspace(-1.5, 1.5, 6)  # (ln sigma - p_mean) / p_std


class Raw(nn.Module):
    """sin(gain x + 0.3 ln(sigma) / 4), the network of all of them."""

    def __init__(self, gain, noise_scale):
        super().__init__()
        self.gain, self.shift = gain, 0.3 / noise_scale

    def forward(self, x, c_noise, labels, augment_labels):
        return (self.gain * x + self.shift * c_noise[:, None, None, None]).sin()


def network(gain, sigma_min=0.0, noise_scale=1.0):
    return Precond(Raw(gain, noise_scale), sigma_min=sigma_min, sigma_data=0.5, noise_scale=noise_scale)


def losses(monkeypatch, method, models, *, intervals=None, step=0, num_steps=100):
    """Return the method's losses with the noise above; `intervals` are the drawn ones of a grid."""

    def levels(batch_size, *, p_mean, p_std, generator, device):
        return (NORMALS * p_std + p_mean).exp()

    module = f"cm_core.methods.{method.kind}"
    monkeypatch.setattr(f"{module}.draw_eps", lambda x0, generator: EPS)
    monkeypatch.setattr(f"{module}.draw_lognormal", levels, raising=False)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(intervals))
    return method.loss(models, Batch(X0, None), context(step, num_steps)).per_sample


def test_edm(monkeypatch):
    found = losses(monkeypatch, EDM(), Models(network(0.9), network(0.1)))
    assert found.tolist() == pytest.approx([1.17383, 1.60833, 1.62195, 1.35533, 1.41536, 1.43869], rel=2e-5)


ECT_LOSSES = [  # stage, what differs from CIFAR-10's settings, losses
    (0, {}, [3.72104, 4.3425, 4.13538, 2.51911, 0.88683, 0.0378666]),
    (1, {}, [3.72104, 4.3425, 4.13538, 2.49487, 0.306555, 0.0268871]),
    (
        1,
        {"distance": PseudoHuber(c_per_sqrt_dim=0.06 / 12**0.5)},
        [1.57127, 3.38687, 3.81997, 2.39351, 0.251271, 0.00902426],
    ),
    (1, {"mapping": "const"}, [3.72591, 4.33275, 4.00142, 1.61797, 0.225106, 0.0268128]),
    (1, {"q": 4, "k": 5.0, "b": 0.7}, [3.7263, 4.33241, 3.98126, 1.5408, 0.197394, 0.0223413]),
    (3, {}, [3.72517, 4.33319, 4.01992, 1.60428, 0.196923, 0.0222968]),
    (
        3,
        {"distance": PseudoHuber(c_per_sqrt_dim=0.06 / 12**0.5)},
        [0.580482, 2.04514, 3.04309, 1.24281, 0.0692288, 0.00173782],
    ),
    (3, {"mapping": "const"}, [3.72822, 4.33021, 3.90263, 1.4045, 0.186301, 0.0222849]),
    (3, {"q": 4, "k": 5.0, "b": 0.7}, [3.72891, 4.32931, 3.87383, 1.35331, 0.177424, 0.0211948]),
]


@pytest.mark.parametrize(("stage", "changes", "expected"), ECT_LOSSES)
def test_ect(monkeypatch, stage, changes, expected):
    model = network(0.9)
    distance = changes.get("distance", PseudoHuber(c_per_sqrt_dim=1e-8))
    models = Models(model, model, None, distance.build((3, 2, 2)))
    found = losses(monkeypatch, ECT(**changes), models, step=stage, num_steps=8)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)  # theirs are differences in float32


CONSISTENCY_LOSSES = [
    (CD(distance=Pixelwise(kind="l1")), [0.0468298, 0.0472384, 0.0193109, 0.0643753, 0.00782183, 0.00114519]),
    (CD(distance=Pixelwise()), [0.00300431, 0.00284742, 0.000591691, 0.00590512, 9.17574e-05, 1.63864e-06]),
    (
        CT(num_scales=18, distance=Pixelwise(kind="l1")),
        [0.0471043, 0.0475037, 0.033621, 0.129816, 0.037444, 0.00490429],
    ),
    (CT(num_scales=18, distance=Pixelwise()), [0.00302692, 0.00294258, 0.00166049, 0.029181, 0.00203742, 3.7416e-05]),
]


@pytest.mark.parametrize(("method", "expected"), CONSISTENCY_LOSSES, ids=["cd-l1", "cd-l2", "ct-l1", "ct-l2"])
def test_consistency_distillation_and_training(monkeypatch, method, expected):
    student, target = (network(gain, NOISE.sigma_min, 1000.0) for gain in (0.9, 0.7))
    models = Models(student, target, network(0.5, noise_scale=1000.0), method.distance.build((3, 2, 2)))
    found = losses(monkeypatch, method, models, intervals=[0, 3, 7, 11, 14, 16])
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_progressive_distillation(monkeypatch):
    student, teacher = (network(gain, noise_scale=1000.0) for gain in (0.9, 0.5))
    models = Models(student, student, teacher, Pixelwise().build((3, 2, 2)))
    found = losses(monkeypatch, PD(start_steps=8), models, intervals=[0, 1, 3, 4, 6, 7])
    assert found.tolist() == pytest.approx(
        [0.0163544, 0.0185293, 0.0123271, 0.00575316, 0.0283378, 0.0482709], rel=1e-4
    )


TANGENTS = [  # distilled, share of the unstable part, norms of g, its first values
    (
        False,
        0.25,
        [1.90668, 1.72795, 1.25004, 0.691786, 0.288613, 0.0994208],
        [0.318398, -0.590613, 0.147357, -0.18967, 0.101532, -0.0345268],
    ),
    (
        False,
        1,
        [1.88953, 1.67023, 1.24652, 1.1589, 0.692211, 0.303111],
        [0.283471, -0.505981, -0.00448808, -0.380165, 0.270191, -0.0852671],
    ),
    (
        True,
        0.25,
        [0.431258, 0.464669, 0.443227, 0.389106, 0.219547, 0.0888409],
        [-0.0181348, 0.0321914, -0.0453317, -0.12224, 0.0910173, -0.0270015],
    ),
    (
        True,
        1,
        [0.543056, 0.699736, 0.930145, 1.0352, 0.703279, 0.325602],
        [-0.0322538, 0.0252532, -0.128786, -0.350479, 0.275915, -0.100808],
    ),
]


@pytest.mark.parametrize(("distil", "share", "norms", "firsts"), TANGENTS)
def test_scm_tangent(monkeypatch, distil, share, norms, firsts):
    """F(x, angle) = sin(gain x + 0.3 angle), as TrigFlow's networks are asked; ours returns -F."""

    class Negative(Raw):
        def forward(self, *args):
            return -super().forward(*args)

    def trigflow(gain):
        return Precond(Negative(gain, 1.0), sigma_min=0.0, sigma_data=0.5, c_noise="angle")

    monkeypatch.setattr("cm_core.methods.scm.draw_eps", lambda x0, generator: EPS)
    models = Models(trigflow(0.9), trigflow(0.1), trigflow(0.5))
    sigma = (NORMALS.double() * 1.4 - 1.0).exp()
    _, _, g = SCM(distil=distil).tangent_at(models, Batch(X0, None), context(), sigma, share)
    assert g.flatten(1).norm(dim=1).tolist() == pytest.approx(norms, rel=1e-5)
    assert g[:, 0, 0, 0].tolist() == pytest.approx(firsts, rel=1e-4, abs=1e-6)
