"""Losses of the authors' own code on the same weights, images and noise: numbers alone.

Computed once, by running NVlabs/edm, locuslab/ect, openai/consistency_models, NVlabs/TCM, mingyuanzhou/SiD, sony/cmt,
Gsunshine/py-meanflow and Lyy-iiis/imeanflow (its u-loss) with the raw network below, in float64 and with their draws
replaced by these; DMD2 by NVlabs/FastGen's functions of images and logits; sCM, whose authors published no code, by
xandergos/sCM-mnist, with the clipped tangent, which it has as an alternative. `slope` is the derivative of the losses'
sum in the gain of the network that is trained: what it goes through, and what is held.
"""

import pytest
import torch
from torch import nn

from cm_core.distances import Pixelwise, PseudoHuber
from cm_core.methods.base import Batch, Models
from cm_core.methods.cd import CD
from cm_core.methods.cmt import CMT
from cm_core.methods.ct import CT
from cm_core.methods.dmd import DMD
from cm_core.methods.ect import ECT
from cm_core.methods.edm import EDM
from cm_core.methods.meanflow import MeanFlow
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.methods.tcm import TCM
from cm_core.precond import AverageVelocity, Precond
from method_oracles import NOISE, context

COUNT = torch.arange(6 * 12, dtype=torch.float64).reshape(6, 3, 2, 2)
X0, EPS = 0.5 * (1.3 * COUNT).sin(), 1.4 * (0.7 * COUNT + 1).cos()
NORMALS = torch.linspace(-1.5, 1.5, 6)  # (ln sigma - p_mean) / p_std
UNIFORM = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)  # of DMD2's and SiD's levels


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
    monkeypatch.setattr(f"{module}.draw_eps", lambda x0, generator: EPS[: len(x0)])
    monkeypatch.setattr(f"{module}.draw_lognormal", levels, raising=False)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(intervals))
    return method.loss(models, Batch(X0, None), context(step, num_steps)).per_sample


def parameter(gain):
    return torch.tensor(gain, dtype=torch.float64, requires_grad=True)


def slope(losses, gain):
    return torch.autograd.grad(losses.sum(), gain)[0].item()


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


class Negative(Raw):
    """F(x, angle) = sin(gain x + 0.3 angle), as TrigFlow's networks are asked; ours returns -F."""

    def forward(self, *args):
        return -super().forward(*args)


def trigflow(gain):
    return Precond(Negative(gain, 1.0), sigma_min=0.0, sigma_data=0.5, c_noise="angle")


@pytest.mark.parametrize(("distil", "share", "norms", "firsts"), TANGENTS)
def test_scm_tangent(monkeypatch, distil, share, norms, firsts):
    monkeypatch.setattr("cm_core.methods.scm.draw_eps", lambda x0, generator: EPS)
    models = Models(trigflow(0.9), trigflow(0.1), trigflow(0.5))
    sigma = (NORMALS.double() * 1.4 - 1.0).exp()
    _, _, g = SCM(distil=distil).tangent_at(models, Batch(X0, None), context(), sigma, share)
    assert g.flatten(1).norm(dim=1).tolist() == pytest.approx(norms, rel=1e-5)
    assert g[:, 0, 0, 0].tolist() == pytest.approx(firsts, rel=1e-4, abs=1e-6)


SCM_LOSSES = [  # distilled, step of a warm-up of 1000, losses, slope
    (False, 250, [0.454802, 0.42014, 0.346948, 0.3142, 0.325322, 0.341173], 0.69807),
    (False, 1000, [0.450402, 0.40703, 0.346374, 0.368419, 0.34927, 0.346034], 1.045052),
    (True, 250, [0.221561, 0.235006, 0.257843, 0.293681, 0.323199, 0.341055], 0.412923),
    (True, 1000, [0.228927, 0.253301, 0.30146, 0.351397, 0.350204, 0.346872], 0.791435),
]


@pytest.mark.parametrize(("distil", "step", "expected", "slopes"), SCM_LOSSES)
def test_scm(monkeypatch, distil, step, expected, slopes):
    gain, method = parameter(0.9), SCM(distil=distil, tangent="clip", warmup_steps=1000)
    models = Models(
        trigflow(gain), trigflow(gain), trigflow(0.5), weighting=lambda sigma: -0.2 - 0.1 * (sigma / 0.5).atan()
    )
    found = losses(monkeypatch, method, models, step=step)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert slope(found, gain) == pytest.approx(slopes, rel=1e-5)


TCM_LOSSES = [  # ratio, c, losses of the levels above the split and of two at it, slope
    (0.999, 1e-8, [0.426139, 0.141064, 0.0149582, 0.0013682], [112.2594, 121.4404], 119.36836),
    (0.75, 0.06, [0.776203, 0.164749, 0.00576506, 0.000301215], [1.421232, 1.325499], 1.113253),
]


@pytest.mark.parametrize(("ratio", "c", "above", "at_split", "slopes"), TCM_LOSSES)
def test_tcm(monkeypatch, ratio, c, above, at_split, slopes):
    """Without the weights of the two kinds of pairs, which their code has in its loop."""
    gain, method = parameter(0.9), TCM(ratio=ratio, distance=PseudoHuber(c_per_sqrt_dim=c / 12**0.5))
    levels, uniform = torch.tensor([7, 1.3, 2.5, 7, 9, 60], dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 1])
    monkeypatch.setattr(TCM, "draw_t", lambda *_: levels)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    model = network(gain)
    models = Models(model, model, None, method.distance.build((3, 2, 2)), base=network(0.5))
    found = losses(monkeypatch, method, models) / torch.where(uniform == 0, 0.1 / 0.25, 1 / 0.75)
    assert found[uniform == 1].tolist() == pytest.approx(above, rel=1e-4)
    assert found[uniform == 0].tolist() == pytest.approx(at_split, rel=1e-4)
    assert slope(found, gain) == pytest.approx(slopes, rel=1e-4)


SID = {"objective": "sid", "generator_sigma": 2.5, "u_min": 0, "u_max": 0.8, "gan_weight": 0, "score_loss": "edm"}
SID_LOSSES = [  # alpha, losses, slope
    (1.2, [-0.000735474, -0.0113548, -0.0719544, -0.0956565, 0.0389175, 0.0431417], 0.605912),
    (1.0, [-0.000720297, -0.0111316, -0.0694027, -0.066735, 0.0462862, 0.0488288], 0.608356),
]


@pytest.mark.parametrize(("alpha", "expected", "slopes"), SID_LOSSES)
def test_sid(monkeypatch, alpha, expected, slopes):
    """Their loss is a sum over the values of an image; this is the mean."""
    gain = parameter(0.9)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: UNIFORM)
    models = Models(network(gain), network(gain), network(0.5), score=network(0.7))
    found = losses(monkeypatch, DMD(**SID, alpha=alpha), models)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert slope(found, gain) == pytest.approx(slopes, rel=1e-5)


def test_the_score_of_sid(monkeypatch):
    gain = parameter(0.7)
    models = Models(network(0.9), network(0.9), network(0.5), score=network(gain))
    found = losses(monkeypatch, DMD(**SID), models, step=1)
    assert found.tolist() == pytest.approx([2.07368, 2.181285, 1.707497, 0.766551, 0.206119, 0.0104952], rel=1e-4)
    assert slope(found, gain) == pytest.approx(7.104987, rel=1e-4)


class Logits(Raw):
    """Three logits an image."""

    def forward(self, *args):
        return 2 * super().forward(*args).flatten(1)[:, :3]


DMD_LOSSES = [  # step, whose turn it decides; losses; slope in the gain of the network in turn
    (0, [0.525075, 0.601804, 0.304432, 0.868249, 0.7416, 0.330725], 0.990571),
    (1, [1.343723, 1.621116, 1.762502, 1.497983, 1.437131, 1.828399], 0.120072),
]


@pytest.mark.parametrize(("step", "expected", "slopes"), DMD_LOSSES, ids=["student", "critic"])
def test_dmd2(monkeypatch, step, expected, slopes):
    student, score = parameter(0.9), parameter(0.7)
    discriminator = Precond(Logits(0.4, 1.0), sigma_min=0.0, sigma_data=0.5)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: UNIFORM)
    models = Models(network(student), network(student), network(0.5), score=network(score), discriminator=discriminator)
    found = losses(monkeypatch, DMD(gan_weight=0.5), models, step=step)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)  # theirs adds 1e-6 to the error that weighs a sample
    assert slope(found, score if step else student) == pytest.approx(slopes, rel=1e-4)


class OfTwoTimes(nn.Module):
    """sin(gain z + 0.3 t - 0.2 (t - r))."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, z, t, labels, augment_labels, span):
        return (self.gain * z + (0.3 * t - 0.2 * span)[:, None, None, None]).sin()


FLOW_LOSSES = [  # settings, losses, slope
    ({}, [1.953851, 1.556026, 1.2997, 1.432981, 1.03846, 1.106684], -0.735069),
    ({"power": 1, "power_c": 0.01}, [0.999314, 0.998298, 0.996511, 0.997636, 0.991496, 0.993391], -0.357747),
    (
        {"tangent": "predicted", "power": 1, "power_c": 0.01},
        [0.999314, 0.998975, 0.998153, 0.997636, 0.99715, 0.99738],
        -1.685633,
    ),
    (
        {"tangent": "predicted", "power": 0.5, "power_c": 0.01},
        [3.816617, 3.120315, 2.322597, 2.051735, 1.867763, 1.948575],
        -3.337459,
    ),
]


@pytest.mark.parametrize(("settings", "expected", "slopes"), FLOW_LOSSES, ids=["meanflow", "p-1", "imf", "imf-p-half"])
def test_meanflow(monkeypatch, settings, expected, slopes):
    gain = parameter(0.9)
    times = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9, 0.98], [0.1, 0.05, 0.2, 0.7, 0.3, 0.01]], dtype=torch.float64)
    monkeypatch.setattr(MeanFlow, "draw_times", lambda *_: tuple(times))
    model = AverageVelocity(OfTwoTimes(gain), sigma_min=0.0, sigma_data=0.5)
    found = losses(monkeypatch, MeanFlow(**settings), Models(model, model))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert slope(found, gain) == pytest.approx(slopes, rel=1e-5)


def test_cmt(monkeypatch):
    """From noise alone and by their solver at order 2; their script adds an image to the noise, and leaves order 3."""
    gain, method = parameter(0.9), CMT(num_steps=3)
    models = Models(network(gain), network(gain), network(0.5), method.distance.build((3, 2, 2)))
    found = losses(monkeypatch, method, models)
    assert found.tolist() == pytest.approx(
        [0.068154, 0.0146762, 0.00354302, 0.0838817, 0.0185069, 0.00456436], rel=1e-5
    )
    assert slope(found, gain) == pytest.approx(-0.356131, rel=1e-5)
