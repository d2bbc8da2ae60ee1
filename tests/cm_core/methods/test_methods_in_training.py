"""Trainings on Gaussian data end at the exact consistency function."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

from cm_core.distances import Pixelwise, PseudoHuber
from cm_core.methods.base import Batch, Models
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf
from cm_core.methods.cmt import CMT
from cm_core.methods.ct import CT
from cm_core.methods.dmd import DMD
from cm_core.methods.ect import ECT
from cm_core.methods.edm import EDM
from cm_core.methods.ict import ICT
from cm_core.methods.meanflow import MeanFlow
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.methods.tcm import TCM
from cm_core.model import build_seeded
from cm_core.sampling import ImageNoise, euler_steps
from cm_core.training.config import Train
from cm_core.training.ema import ConstantEma
from cm_core.training.optimizers import Optimizer
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from flows.stages.student import build_weighting
from method_oracles import CPU, SHORT, distance_of, spec_of
from oracles import GaussianConsistency, GaussianDenoiser


def test_pd_trained_on_gaussian_data_samples_in_one_step_what_its_teacher_samples_in_many():
    method = PD(start_steps=4)
    teacher, model = copy.deepcopy(trained_denoiser(SHORT)), build_seeded(spec_of(method), 0)
    model.load_state_dict(teacher.state_dict())
    train = short_training(1200, learning_rate=2e-3)
    state = TrainState(model, train, teacher=teacher)
    models = Models(model, model, teacher, distance_of(method, (1, 1, 2)))
    for _ in Trainer(state, method, models, GaussianBatches(train.batch_size), SHORT, 0).run():
        pass
    model.load_state_dict(state.averaged())
    noise = ImageNoise(0, range(2048), (1, 1, 2), CPU)
    with torch.no_grad():
        x = euler_steps(model.eval(), noise, [SHORT.sigma_max, SHORT.sigma_min])
    x_t = SHORT.sigma_max * ImageNoise(0, range(2048), (1, 1, 2), CPU).draw()
    exact = GaussianConsistency(SHORT)(x_t, torch.full((2048,), SHORT.sigma_max)).clamp(-1, 1)
    # Eight Euler steps shrink the samples to 0.9 of the exact ones; the last student must land within that.
    assert ((x - exact).square().mean() / exact.square().mean()).sqrt().item() < 0.2


def short_training(num_steps, learning_rate=5e-3):
    return Train(
        num_steps=num_steps,
        batch_size=256,
        optimizer=Optimizer(kind="adam", learning_rate=learning_rate),
        emas=(ConstantEma(decay=0.98),),
        log_every=400,
        save_every=400,
        grid_every=400,
    )


@functools.cache
def trained_denoiser(noise):
    model = build_seeded(spec_of(EDM(), noise=noise), 0)
    state = TrainState(model, short_training(800))
    for _ in Trainer(state, EDM(p_mean=0.0), Models(model, model), GaussianBatches(256), SHORT, 0).run():
        pass
    model.load_state_dict(state.averaged())
    return model.eval().requires_grad_(False)


TRAINED = [
    pytest.param(CD(num_scales=8, distance=Pixelwise()), 0.1, id="cd-l2"),
    pytest.param(CD(num_scales=8, solver="euler", distance=PseudoHuber()), 0.3, id="cd-euler-huber"),
    pytest.param(CT(s0=2, s1=16, distance=Pixelwise()), 0.2, id="ct"),
    pytest.param(ICT(s0=4, s1=16, p_mean=0.0, p_std=1.5), 0.3, id="ict"),
    # In two dimensions the norm's gradient does not shrink with the error, so ect is tried with l2 here.
    pytest.param(ECT(num_stages=4, p_mean=0.0, p_std=1.5, distance=Pixelwise()), 0.2, id="ect"),
    pytest.param(ECT(num_stages=4, p_mean=0.0, p_std=1.5, solver="heun"), 0.3, id="ect-distil"),
    pytest.param(SCM(p_mean=0.0, p_std=1.0, warmup_steps=400), 0.2, id="scm", marks=pytest.mark.slow),
    pytest.param(
        SCM(p_mean=0.0, p_std=1.0, warmup_steps=400, distil=True, adaptive_weight=False),
        0.2,
        id="scm-distil",
        marks=pytest.mark.slow,
    ),
    pytest.param(MeanFlow(t_mean=0.5, r_mean=-2.0), 0.3, id="meanflow"),
    pytest.param(MeanFlow(t_mean=0.5, r_mean=-2.0, tangent="predicted"), 0.3, id="meanflow-predicted"),
    pytest.param(CMT(num_steps=8), 0.1, id="cmt", marks=pytest.mark.slow),
    pytest.param(TCM(ratio=0.8, scale=1.0, freedom=2.0, distance=Pixelwise()), 0.2, id="tcm", marks=pytest.mark.slow),
    pytest.param(CMInf(), 0.3, id="cm_inf", marks=pytest.mark.slow),
    pytest.param(CMInf(stop_gradient=False), 0.3, id="cm_inf-through", marks=pytest.mark.slow),
    pytest.param(CMInf(distil=False), 0.3, id="cm_inf-isolated", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "tolerance"), TRAINED)
def test_training_reaches_the_exact_consistency_function(method, tolerance):
    """A small MLP on Gaussian data: relative RMS error of f over the noise levels of training."""
    f = train_on_gaussian(method)
    generator = torch.Generator().manual_seed(7)
    errors = []
    for sigma in (sigma for sigma in SHORT.grid(12)[:-1].float() if sigma >= getattr(method, "split", 0)):
        level = sigma.expand(2048)
        x_t = (sigma**2 + 0.25).sqrt() * torch.randn(2048, 1, 1, 2, generator=generator)
        exact = GaussianConsistency(boundary_of(method))(x_t, level)
        errors.append(((f(x_t, level) - exact).square().mean() / exact.square().mean()).sqrt().item())
    assert max(errors) < tolerance, errors


def boundary_of(method):
    """The noise range of the exact function: one with EDM's scalings or none ends at 0, not at sigma_min."""
    return SHORT.model_copy(update={"sigma_min": 0.0}) if method.form in ("unshifted", "average_velocity") else SHORT


def train_on_gaussian(method):
    tuned = isinstance(method, ECT | SCM)  # what tunes a denoiser starts from one, at a lower rate
    noise = SHORT.model_copy(update={"c_noise": "angle"}) if isinstance(method, SCM) else SHORT
    model, target = (build_seeded(spec_of(method, noise=noise), 0) for _ in range(2))
    if tuned:
        model.load_state_dict(trained_denoiser(noise).state_dict())
    train = short_training(1600 if method.forward_mode and tuned else 800, learning_rate=1e-3 if tuned else 5e-3)
    state = TrainState(
        model, train, target=target if method.keeps_target else None, weighting=build_weighting(method, 0, CPU)
    )
    distance = distance_of(method, (1, 1, 2))
    target, base = target if method.keeps_target else model, GaussianConsistency(boundary_of(method))
    models = Models(model, target, GaussianDenoiser(), distance, state.weighting, base=base)
    for _ in Trainer(state, method, models, GaussianBatches(train.batch_size), SHORT, 0).run():
        pass
    model.load_state_dict(state.averaged())
    return model.eval().requires_grad_(False)


class GaussianFamily(nn.Module):
    """N(mean, std^2) with both learned: as a generator, or as its exact denoiser."""

    def __init__(self, *, generates):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(0.1).log())
        self.generates = generates

    def forward(self, x, sigma, labels=None):
        sigma, variance = sigma[:, None, None, None], (2 * self.log_std).exp()
        if self.generates:
            return self.mean + self.log_std.exp() * x / sigma
        return self.mean + (x - self.mean) * variance / (variance + sigma**2)


@pytest.mark.parametrize("changes", [{"objective": "vsd"}, {"objective": "sid", "alpha": 1.0}], ids=["vsd", "sid"])
def test_training_with_a_learned_score_reaches_the_distribution_of_the_data(changes):
    method = DMD(gan_weight=0, student_every=2, score_loss="edm", **changes)
    optimizer = Optimizer(kind="adam", learning_rate=1e-2, betas=(0.5, 0.99))
    every = dict.fromkeys(("num_steps", "log_every", "save_every", "grid_every"), 600)
    train = Train(batch_size=64, optimizer=optimizer, schedule="cosine", emas=(ConstantEma(decay=0.9),), **every)
    student, score = GaussianFamily(generates=True), GaussianFamily(generates=False)
    state = TrainState(student, train, score=score, cycle=2)
    models = Models(student, student, GaussianDenoiser(), score=score)
    for _ in Trainer(state, method, models, GaussianBatches(64), SHORT, 0).run():
        pass
    assert abs(student.mean) < 0.1 and abs(student.log_std.exp() / 0.5 - 1) < 0.15
    assert abs(score.mean) < 0.1 and abs(score.log_std.exp() / 0.5 - 1) < 0.3


@dataclasses.dataclass
class GaussianBatches:
    """Endless fresh samples of N(0, 0.5^2), in place of a data set."""

    batch_size: int
    device: torch.device = torch.device("cpu")

    def at(self, step):
        generator = torch.Generator().manual_seed(step)
        return Batch(0.5 * torch.randn(self.batch_size, 1, 1, 2, generator=generator), None)
