"""Training methods: their losses on the exact solution, where gradients go, and that training reaches the solution."""

import math

import pytest
import torch
from pydantic import ValidationError

from cm_core.curricula import ct_num_scales
from cm_core.distances import Pixelwise, PseudoHuber
from cm_core.methods.base import Batch, LogWeight, Models, draw_eps
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf, hessian_product, warp
from cm_core.methods.cmt import CMT
from cm_core.methods.ct import CT
from cm_core.methods.ect import ECT
from cm_core.methods.edm import EDM
from cm_core.methods.ict import ICT
from cm_core.methods.pd import PD, two_step_estimate
from cm_core.methods.scm import SCM
from cm_core.model import build_seeded
from cm_core.networks.dropout import seed_dropout
from cm_core.noise import add_noise, draw_lognormal
from cm_core.precond import AverageVelocity, Precond
from cm_core.solvers import euler_step
from cm_core.tensors import expand_like
from method_oracles import (
    CPU,
    NOISE,
    context,
    distance_of,
    every_method,
    gaussian_batch,
    oracle_models,
    precond,
    shake,
    spec_of,
)
from oracles import DropoutNet, GaussianConsistency, GaussianDenoiser, HalfAngleNet


@pytest.mark.parametrize(("solver", "factor"), [("euler", 4), ("heun", 8)])
def test_cd_residual_of_the_exact_solution_falls_with_the_solvers_order(solver, factor):
    residuals = []
    for num_scales in (200, 399):  # 399 points halve every interval
        method = CD(num_scales=num_scales, solver=solver, distance=Pixelwise(kind="l1"))
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


@every_method
def test_gradients_reach_the_student_alone(method):
    student, target, teacher = (precond(seed, form) for seed, form in enumerate([method.form, method.form, "denoiser"]))
    score = precond(3, "denoiser").requires_grad_(False)  # as the loop leaves it at a step of the student
    base = precond(4, method.form).requires_grad_(False)
    models = Models(
        student, target, teacher.requires_grad_(False), distance_of(method), method.build_weighting(), score, base=base
    )
    method.loss(models, gaussian_batch(64, dtype=torch.float32), context()).per_sample.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
    assert any(p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for network in (target, teacher, base) for p in network.parameters())


@every_method
def test_student_and_target_drop_the_same_activations(method):
    seen = []
    wrapper = AverageVelocity if method.form == "average_velocity" else Precond
    model = wrapper(DropoutNet(), sigma_min=NOISE.sigma_min, sigma_data=NOISE.sigma_data).train()
    model.net.register_forward_hook(lambda module, args, out: seen.append(out.detach() == 0))
    distance, denoiser = distance_of(method, (1, 8, 8)), GaussianDenoiser()
    models = Models(model, model, denoiser, distance, score=denoiser, base=model)
    seed_dropout(0, torch.device("cpu"))
    method.loss(models, gaussian_batch(16, (1, 8, 8), torch.float32), context())
    assert all(torch.equal(mask, seen[0]) for mask in seen)
    passes = len(seen)
    once = method.form in ("euler", "generator") or getattr(method, "stop_gradient", None) is False
    thrice = getattr(method, "tangent", None) == "predicted" or method.needs_base
    assert passes == (1 if once or method.kind == "cmt" else 3 if thrice else 2)
    seed_dropout(5, torch.device("cpu"))
    method.loss(models, gaussian_batch(16, (1, 8, 8), torch.float32), context())
    assert not torch.equal(seen[0], seen[passes])


def test_dropout_leaves_the_global_generator_where_it_was():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    test_student_and_target_drop_the_same_activations(CT(s1=20))
    assert torch.equal(torch.rand(3), expected)


GUIDED = {
    "cd": CD(guidance=3),
    "ect": ECT(solver="euler", guidance=3),
    "pd": PD(start_steps=8, guidance=3),
    "scm": SCM(distil=True, guidance=3),
    "cm_inf": CMInf(guidance=3),
    "cmt": CMT(guidance=3),
}


@pytest.mark.parametrize("method", GUIDED.values(), ids=GUIDED)
def test_distillation_follows_the_guided_teacher(method):
    """A teacher that adds half the label to its estimate: guidance 3 adds one and a half, whatever the method."""

    class Labelled(GaussianDenoiser):
        def forward(self, x, sigma, labels):
            shift = 0.5 * (labels + 1).to(x.dtype)  # label 0 against none, which is -1
            return super().forward(x, sigma) + expand_like(shift, x)

    class Shifted(GaussianDenoiser):
        def forward(self, x, sigma, labels):
            return super().forward(x, sigma) + 1.5

    batch = gaussian_batch(64, (1, 1, 2))._replace(labels=torch.zeros(64, dtype=torch.int64))
    model = build_seeded(spec_of(method), 0).double()
    plain = method.model_copy(update={"guidance": 1.0})
    losses = [
        m.loss(Models(model, model, teacher, distance_of(m, (1, 1, 2))), batch, context()).per_sample
        for m, teacher in ((method, Labelled()), (plain, Shifted()), (plain, Labelled()))
    ]
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2])


def test_pd_guides_by_the_first_teacher_alone():
    asked = []

    class Spy(GaussianDenoiser):
        def forward(self, x, sigma, labels):
            asked.append(len(x))
            return super().forward(x, sigma)

    method = PD(start_steps=4, guidance=2)
    batch = gaussian_batch(8, (1, 1, 2))._replace(labels=torch.zeros(8, dtype=torch.int64))
    for step in (0, 99):
        models = Models(GaussianConsistency(NOISE), GaussianConsistency(NOISE), Spy(), distance_of(method, (1, 1, 2)))
        method.loss(models, batch, context(step=step))
    assert asked == [16, 16, 8, 8]


def test_ct_pairs_share_their_noise():
    seen = {}

    class Spy(GaussianConsistency):
        def forward(self, x, t, labels=None):
            seen["r" if "t" in seen else "t"] = (x, t)
            return super().forward(x, t)

    method, batch = CT(), gaussian_batch(64)
    spy = Spy(NOISE)
    method.loss(Models(spy, spy, None, Pixelwise().build((1, 2, 2))), batch, context(step=50))
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


def test_ect_mapping_matches_the_printed_values():
    def closer(t, stage, **changes):
        return ECT(**changes).closer(torch.tensor([t], dtype=torch.float64), stage).item()

    printed = [(0.821, 1, 0.114035), (1, 1, 0.212117), (2, 1, 1.023188), (80, 1, 60), (0.1, 7, 0.098125)]
    for t, stage, r in [*printed, (1, 7, 0.987689), (80, 7, 79.6875)]:
        assert closer(t, stage) == pytest.approx(r, abs=6e-7)
    assert closer(1.9459, 0) == 0 and closer(1.946, 0) > 0  # below ln 7 the first stage is plain denoising
    assert closer(1.0, 0, q=256) == pytest.approx(closer(1.0, 7), rel=1e-12)
    for stage, same in enumerate((1, 3, 5, 7)):
        assert closer(1.0, stage, q=4) == pytest.approx(closer(1.0, same), rel=1e-12)
    assert closer(1.0, 0, mapping="const") == 0.5


def test_ect_at_r_zero_is_denoising_and_the_network_is_never_asked_there():
    seen = []

    class Spy(GaussianConsistency):
        def forward(self, x, t, labels=None):
            seen.append(t)
            return super().forward(x, t)

    spy, batch, method = Spy(NOISE), gaussian_batch(512), ECT(p_mean=-3.0, distance=Pixelwise())
    loss = method.loss(Models(spy, spy, None, Pixelwise().build((1, 2, 2))), batch, context())
    t, asked = seen
    assert (method.closer(t, 0) == 0).float().mean() > 0.9 and (asked > 0).all()
    denoising = t < math.log(7)
    eps = draw_again(batch, method)
    expected = (spy(add_noise(batch.x0, eps, t), t) - batch.x0).square().flatten(1).mean(1) / t
    torch.testing.assert_close(loss.per_sample[denoising], expected[denoising])


def test_ect_asks_the_target_at_the_noise_of_its_input_also_below_sigma_min():
    seen = []

    class Spy(GaussianConsistency):
        def forward(self, x, t, labels=None):
            seen.append(t)
            return super().forward(x, t)

    spy, method = Spy(NOISE), ECT(p_mean=math.log(0.002), p_std=0.3, mapping="const", distance=Pixelwise())
    method.loss(Models(spy, spy, None, Pixelwise().build((1, 2, 2))), gaussian_batch(512), context())
    t, asked = seen
    r = method.closer(t, 0)
    assert ((r > 0) & (r < NOISE.sigma_min)).float().mean() > 0.9
    torch.testing.assert_close(asked, r, rtol=0, atol=0)


def draw_again(batch, method):
    generator = context().generator
    draw_lognormal(len(batch.x0), p_mean=method.p_mean, p_std=method.p_std, generator=generator, device=CPU)
    return draw_eps(batch.x0, generator)


def test_one_pd_step_lands_where_two_teacher_steps_land():
    sigmas, teacher = NOISE.grid(2 * 6 + 1), GaussianDenoiser()
    t, middle, r = sigmas[:-2:2], sigmas[1:-1:2], sigmas[2::2]
    x_t = torch.randn(6, 1, 2, 2, dtype=torch.float64) * t[:, None, None, None]
    estimate = two_step_estimate(teacher, x_t, t, middle, r)
    landed = euler_step(lambda x, sigma: estimate, x_t, t, r)
    expected = euler_step(teacher, euler_step(teacher, x_t, t, middle), middle, r)
    torch.testing.assert_close(landed, expected, rtol=1e-12, atol=1e-14)


def test_pd_halvings_replace_teacher_optimiser_and_averages():
    method = PD(start_steps=8)
    rounds = [method.halving_at(step, 60) for step in range(60)]
    assert [r.num_intervals for r in rounds] == [8] * 10 + [4] * 10 + [2] * 20 + [1] * 20
    assert [step for step in range(60) if method.replaces_teacher_at(step, 60)] == [10, 20, 40]
    factors = [method.learning_rate_factor(step, 60) for step in (0, 5, 9, 10, 20, 39)]
    assert factors == pytest.approx([1, 0.5, 0.1, 1, 1, 0.05])


@pytest.mark.parametrize("c_noise", ["angle", "log_sigma"])
def test_scm_tangent_agrees_with_central_differences(c_noise):
    model = spec_of(SCM(), noise=NOISE.model_copy(update={"c_noise": c_noise})).build().double()
    shake(model)
    sigma = torch.tensor([0.01, 0.1, 0.5, 2.0, 20.0], dtype=torch.float64)
    batch = Batch(torch.randn(5, 1, 1, 2, dtype=torch.float64), None)
    angle = (sigma / 0.5).atan()
    method = SCM()
    _, _, g = method.tangent_at(Models(model, model), batch, context(), sigma, 1.0)
    eps = draw_eps(batch.x0, context().generator)
    step = 1e-6
    ahead, behind = (f_at_angle(model, batch.x0, eps, angle + change) for change in (step, -step))
    expected = angle.cos()[:, None, None, None] * (ahead - behind) / (2 * step)
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-8)


def f_at_angle(model, x0, eps, angle):
    """f at another angle of the straight path from x0 through eps, whose TrigFlow form is cos x0 + sin sd eps."""
    sigma = 0.5 * angle.tan()
    return model(add_noise(x0, eps, sigma), sigma)


def test_scm_tangent_vanishes_for_the_exact_function_on_the_teachers_trajectories():
    exact = Precond(HalfAngleNet(), sigma_min=0.0, sigma_data=0.5, c_noise="angle")
    x, sigma = torch.randn(8, 1, 2, 2, dtype=torch.float64), torch.logspace(-2, 1.5, 8, dtype=torch.float64)
    zero_boundary = NOISE.model_copy(update={"sigma_min": 0.0})
    torch.testing.assert_close(exact(x, sigma), GaussianConsistency(zero_boundary)(x, sigma))
    batch = gaussian_batch(8)
    _, _, g = SCM(distil=True).tangent_at(Models(exact, exact, GaussianDenoiser()), batch, context(), sigma, 1.0)
    assert g.abs().max().item() < 1e-12
    _, _, isolated = SCM().tangent_at(Models(exact, exact), batch, context(), sigma, 1.0)
    assert isolated.abs().max().item() > 0.1  # single noise paths are no trajectories; only their mean is


def test_scm_bounds_its_tangent():
    g = 100 * torch.randn(6, 3, 4, 4)
    norms = SCM().bound(g).flatten(1).norm(dim=1)
    assert (norms < 1).all() and (norms > 0.99).all()
    assert SCM(tangent="clip").bound(g).abs().max() == 1


def test_log_weight_learns_the_inverse_error():
    torch.manual_seed(0)
    weight = LogWeight()
    sigma = torch.logspace(-2, 1.9, 64)
    error = 0.1 + sigma.log().sin().square()
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.05)
    for _ in range(1500):
        w = weight(sigma)
        (w.exp() * error - w).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close((-weight(sigma)).exp(), error, rtol=0.15, atol=0.05)


def test_cm_inf_derivative_vanishes_for_the_exact_function():
    exact, batch = GaussianConsistency(NOISE), gaussian_batch(256)
    for method in (CMInf(), CMInf(stop_gradient=False), CMInf(stop_gradient=False, distance=Pixelwise(kind="l1"))):
        models = Models(exact, exact, GaussianDenoiser(), distance_of(method))
        losses = method.loss(models, batch, context()).per_sample
        assert losses.abs().max().item() < 1e-4  # sigma is float32


def test_hessian_products_match_the_closed_forms():
    at, v = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(hessian_product(Pixelwise().build((3, 2, 2)), at, v), 2 * v / 12)
    c = PseudoHuber().c_per_sqrt_dim * math.sqrt(12)
    torch.testing.assert_close(hessian_product(PseudoHuber().build((3, 2, 2)), at, v), v / c)


def test_cm_inf_gradient_is_the_limit_of_the_discrete_one():
    # (d/dtheta) d(f(x_t, t), sg f(x_r, r)) / (t - r) -> <df/dtheta, H df/dsigma> as r -> t, on the same trajectory
    model = spec_of(CMInf()).build().double()
    shake(model)
    batch, method = gaussian_batch(32, (1, 1, 2)), CMInf()
    models = Models(model, model, GaussianDenoiser(), Pixelwise().build((1, 1, 2)))
    loss = method.loss(models, batch, context())
    found = torch.autograd.grad(loss.per_sample.mean(), list(model.parameters()))
    t = loss.sigma.double()
    generator = context().generator
    torch.rand(32, generator=generator)
    x_t = add_noise(batch.x0, draw_eps(batch.x0, generator), t)
    r = t * (1 - 1e-6)
    x_r = euler_step(GaussianDenoiser(), x_t, t, r)
    discrete = models.distance(model(x_t, t), model(x_r, r).detach()) / (t - r)
    expected = torch.autograd.grad(discrete.mean(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_cm_inf_draws_the_density_of_the_karras_grid():
    u = torch.linspace(0, 1, 18, dtype=torch.float64)
    torch.testing.assert_close(warp(u, NOISE).flip(0), NOISE.grid(18), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distance": {"kind": "l1"}}, "distance l1 has no Hessian"),
        ({"distance": {"kind": "pseudo_huber"}, "stop_gradient": False}, "not defined with stop_gradient=false"),
        ({"distil": False, "stop_gradient": False}, "exists with stop_gradient=true only"),
    ],
)
def test_cm_inf_refuses_what_the_paper_does_not_define(changes, words):
    with pytest.raises(ValidationError, match=words):
        CMInf(**changes)


def test_pd_refuses_steps_that_do_not_halve():
    with pytest.raises(ValidationError, match="start_steps=6 must be end_steps=1 times a power of two"):
        PD(start_steps=6)
