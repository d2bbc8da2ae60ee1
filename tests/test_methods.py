"""Training methods: their losses on the exact solution, where gradients go, and that training reaches the solution."""

import dataclasses

import pytest
import torch

from cm_core.curricula import ct_num_scales
from cm_core.distances import L1, L2, PseudoHuber
from cm_core.ema import ConstantEma
from cm_core.loop import Adam, Train, TrainState, fit
from cm_core.methods.base import Batch, Models, StepContext
from cm_core.methods.cd import CD
from cm_core.methods.ct import CT
from cm_core.methods.edm import EDM
from cm_core.methods.ict import ICT
from cm_core.model import ModelSpec, build_seeded
from cm_core.networks import MLPParams
from cm_core.noise import Noise
from cm_core.precond import Precond
from oracles import DropoutNet, GaussianConsistency, GaussianDenoiser

NOISE = Noise()
STUDENT_METHODS = [CD(), CD(target_decay=0.9), CT(s1=20), ICT(s1=80)]
IDS = ["cd", "cd-ema", "ct", "ict"]


def context(step=0, num_steps=100, noise=NOISE, seed=0):
    return StepContext(step, num_steps, noise, torch.Generator().manual_seed(seed), dropout_seed=seed)


def gaussian_batch(size=4096, shape=(1, 2, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return Batch(0.5 * torch.randn(size, *shape, generator=generator, dtype=dtype), None)


def oracle_models(method):
    exact = GaussianConsistency(NOISE)
    return Models(exact, exact, GaussianDenoiser(), method.distance.build((1, 2, 2)))


@pytest.mark.parametrize(("solver", "factor"), [("euler", 4), ("heun", 8)])
def test_cd_residual_of_the_exact_solution_falls_with_the_solvers_order(solver, factor):
    residuals = []
    for num_scales in (200, 399):  # 399 points halve every interval
        method = CD(num_scales=num_scales, solver=solver, distance=L1())
        loss = method.loss(oracle_models(method), gaussian_batch(20_000), context())
        residuals.append(loss.per_sample.mean().item())
    assert residuals[0] / residuals[1] == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize(("num_scales", "worst"), [(18, 0.01994), (40, 0.00163)])
def test_cd_heun_pairs_deviate_from_the_exact_flow_as_printed(num_scales, worst):
    from cm_core.solvers import heun_step

    sigmas, f = NOISE.grid(num_scales), GaussianConsistency(NOISE)
    t, r, x_t = sigmas[:-1], sigmas[1:], torch.ones(num_scales - 1, 1, dtype=torch.float64)
    x_r = heun_step(GaussianDenoiser(), x_t, t, r)
    assert (f(x_r, r) / f(x_t, t) - 1).abs().max().item() == pytest.approx(worst, rel=5e-3)


def test_edm_loss_of_the_exact_denoiser_is_the_irreducible_one():
    # E|D - x0|^2 is the posterior variance, sigma^2 sd^2 / (sigma^2 + sd^2): times the weight it is 1 at every sigma
    exact = ExactDenoiser()
    loss = EDM().loss(Models(exact, exact), gaussian_batch(50_000), context())
    assert loss.per_sample.mean().item() == pytest.approx(1.0, rel=0.01)
    low = loss.per_sample[loss.sigma < 0.3].mean().item()
    assert low == pytest.approx(1.0, rel=0.02)


class ExactDenoiser(GaussianDenoiser):
    def forward(self, x, sigma, labels=None, augment_labels=None):
        return super().forward(x, sigma)


def test_ict_weights_are_the_inverse_gaps():
    method = ICT()
    models, batch = oracle_models(method), gaussian_batch(512)
    loss = method.loss(models, batch, context())
    sigmas = NOISE.grid(11)
    gaps = {round(float(t), 4): float(1 / (t - r)) for t, r in zip(sigmas[:-1], sigmas[1:], strict=True)}
    unweighted = loss.per_sample / torch.tensor([gaps[round(float(t), 4)] for t in loss.sigma])
    assert (unweighted <= models.distance(torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 2, 2))).all()
    assert loss.scalars["num_scales"] == 11


@pytest.mark.parametrize("method", STUDENT_METHODS, ids=IDS)
def test_gradients_reach_the_student_alone(method):
    student, target, teacher = (precond(seed) for seed in range(3))
    models = Models(student, target, teacher, method.distance.build((1, 2, 2)))
    method.loss(models, gaussian_batch(64, dtype=torch.float32), context()).per_sample.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
    assert any(p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for network in (target, teacher) for p in network.parameters())


def precond(seed):
    spec = ModelSpec(form="skip", network=MLPParams(width=16, depth=1), noise=NOISE, image_shape=(1, 2, 2))
    model = build_seeded(spec, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return model


@pytest.mark.parametrize("method", STUDENT_METHODS, ids=IDS)
def test_student_and_target_drop_the_same_activations(method):
    seen = []
    model = Precond(DropoutNet(), sigma_min=NOISE.sigma_min, sigma_data=NOISE.sigma_data).train()
    model.net.register_forward_hook(lambda module, args, out: seen.append(out.detach() == 0))
    models = Models(model, model, GaussianDenoiser(), method.distance.build((1, 8, 8)))
    method.loss(models, gaussian_batch(16, (1, 8, 8), torch.float32), context())
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    method.loss(models, gaussian_batch(16, (1, 8, 8), torch.float32), context(seed=5))
    assert not torch.equal(seen[0], seen[2])


def test_dropout_leaves_the_global_generator_where_it_was():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    test_student_and_target_drop_the_same_activations(CT(s1=20))
    assert torch.equal(torch.rand(3), expected)


def test_ct_pairs_share_their_noise():
    seen = {}

    class Spy(GaussianConsistency):
        def forward(self, x, t, labels=None):
            seen["r" if "t" in seen else "t"] = (x, t)
            return super().forward(x, t)

    method, batch = CT(), gaussian_batch(64)
    spy = Spy(NOISE)
    method.loss(Models(spy, spy, None, L2().build((1, 2, 2))), batch, context(step=50))
    (x_t, t), (x_r, r) = seen["t"], seen["r"]
    eps_t, eps_r = (x_t - batch.x0) / t[:, None, None, None], (x_r - batch.x0) / r[:, None, None, None]
    torch.testing.assert_close(eps_t, eps_r, rtol=1e-6, atol=1e-6)
    grid = NOISE.grid(ct_num_scales(50, num_steps=100, s0=2, s1=150)).float()
    where = torch.searchsorted(-grid, -t.float())
    torch.testing.assert_close(grid[where + 1], r.float())


def test_label_dropout_hides_the_asked_share():
    seen = []

    class Spy(ExactDenoiser):
        def forward(self, x, sigma, labels=None, augment_labels=None):
            seen.append(labels)
            return super().forward(x, sigma)

    batch = Batch(gaussian_batch(10_000).x0, torch.ones(10_000, dtype=torch.int64))
    EDM(label_dropout=0.2).loss(Models(Spy(), Spy()), batch, context())
    assert (seen[0] == -1).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert set(seen[0].tolist()) == {-1, 1}


SHORT = Noise(sigma_min=0.05, sigma_max=5.0)  # few scales carry the boundary to the top within seconds
TRAINED = [
    pytest.param(CD(num_scales=8, distance=L2()), 0.1, id="cd-l2"),
    pytest.param(CD(num_scales=8, solver="euler", distance=PseudoHuber()), 0.3, id="cd-euler-huber"),
    pytest.param(CT(s0=2, s1=16, distance=L2()), 0.2, id="ct"),
    pytest.param(ICT(s0=4, s1=16, p_mean=0.0, p_std=1.5), 0.3, id="ict"),
]


@pytest.mark.parametrize(("method", "tolerance"), TRAINED)
def test_training_reaches_the_exact_consistency_function(method, tolerance):
    """A small MLP on Gaussian data: relative RMS error of f over the noise levels of training."""
    f = train_on_gaussian(method)
    generator = torch.Generator().manual_seed(7)
    errors = []
    for sigma in SHORT.grid(12)[:-1].float():
        level = sigma.expand(2048)
        x_t = (sigma**2 + 0.25).sqrt() * torch.randn(2048, 1, 1, 2, generator=generator)
        exact = GaussianConsistency(SHORT)(x_t, level)
        errors.append(((f(x_t, level) - exact).square().mean() / exact.square().mean()).sqrt().item())
    assert max(errors) < tolerance, errors


def train_on_gaussian(method, num_steps=800):
    spec = ModelSpec(form=method.form, network=MLPParams(width=32, depth=1), noise=SHORT, image_shape=(1, 1, 2))
    model, target = build_seeded(spec, 0), build_seeded(spec, 0)
    train = Train(
        num_steps=num_steps,
        batch_size=256,
        optimizer=Adam(learning_rate=5e-3),
        emas=(ConstantEma(decay=0.98),),
        log_every=400,
        save_every=400,
        grid_every=400,
    )
    state = TrainState.start(model, target if method.keeps_target else None, train)
    distance = method.distance.build(spec.image_shape)
    models = Models(model, target if method.keeps_target else model, GaussianDenoiser(), distance)
    for _ in fit(state, method, models, GaussianBatches(train.batch_size), train, noise=SHORT, seed=0):
        pass
    model.load_state_dict(state.averaged())
    return model.eval().requires_grad_(False)


@dataclasses.dataclass
class GaussianBatches:
    """Endless fresh samples of N(0, 0.5^2), in place of a data set."""

    batch_size: int
    device: torch.device = torch.device("cpu")

    def at(self, step):
        generator = torch.Generator().manual_seed(step)
        return Batch(0.5 * torch.randn(self.batch_size, 1, 1, 2, generator=generator), None)
