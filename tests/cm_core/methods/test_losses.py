"""Each method's loss, computed a second time from the paper's formula on what the networks were asked, in float64.

The networks are small functions that differ from each other, depend on all of their inputs and write down each call;
the time and noise of a sample follow from the student's input, so that no test repeats a method's draws.
"""

import dataclasses
import math

import pytest
import torch
from torch import nn

from cm_core.augment import Augment
from cm_core.distances import Pixelwise, PseudoHuber
from cm_core.methods.base import Batch, LogWeight, Method, Models, draw_eps, grid_on, teacher_of
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf, hessian_product, warp
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
from cm_core.networks.modes import derivative
from method_oracles import CPU, NOISE, STUDENT_METHODS, context, every_method
from toy_networks import SHAPE, SIZE, Toy, is_unit_noise, spread, the_batch


def ask(method, *, step=0, num_steps=100, own_target=True, weighting=None):
    """Return the loss, the batch, the networks, and t and eps as the student's first input has them."""
    student, target, teacher = Toy(0.9), Toy(0.7), Toy(0.5)
    distance = method.distance.build(SHAPE) if hasattr(method, "distance") else None
    models, batch = Models(student, target if own_target else student, teacher, distance, weighting), the_batch()
    loss = method.loss(models, batch, context(step, num_steps))
    assert loss.per_sample.shape == loss.sigma.shape == (SIZE,)
    first = student.calls[0]
    t = first.sigma.double()
    return loss, batch, models, t, (first.x - batch.x0) / spread(t)


def next_lower(t, grid):
    """The level below each t of a decreasing grid, and the shares of its intervals."""
    index = (t[:, None] - grid[None].float().double()).abs().argmin(1)
    torch.testing.assert_close(t, grid[index].float().double(), rtol=0, atol=0)
    return grid[index + 1].float().double(), torch.bincount(index, minlength=len(grid) - 1) / len(t)


def asked_once(network, x, sigma, labels, *, grad):
    (call,) = network.calls
    torch.testing.assert_close(call.x, x, rtol=1e-6, atol=1e-6)  # methods compute with float32 levels
    torch.testing.assert_close(call.sigma.double(), sigma, rtol=0, atol=0)
    assert torch.equal(call.labels, labels) and call.grad == grad
    return True


def guided(teacher, x, sigma, labels, guidance):
    with_label, without = teacher.value(x, sigma, labels), teacher.value(x, sigma, torch.full_like(labels, -1))
    return without + guidance * (with_label - without)


def one_step(solver, denoise, x, t, r):
    d = (x - denoise(x, t)) / spread(t)
    euler = x + spread(r - t) * d
    if solver == "euler":
        return euler
    return x + spread(r - t) * (d + (euler - denoise(euler, r)) / spread(r)) / 2


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_cd(solver, guidance):
    method = CD(solver=solver, guidance=guidance)
    loss, batch, models, t, eps = ask(method)
    r, shares = next_lower(t, NOISE.grid(18))
    assert shares.min() > 0.4 / 17 and shares.max() < 2 / 17 and is_unit_noise(eps)
    x_t = batch.x0 + spread(t) * eps
    x_r = one_step(solver, lambda x, s: guided(models.teacher, x, s, batch.labels, guidance), x_t, t, r)
    assert asked_once(models.student, x_t, t, batch.labels, grad=True)
    assert asked_once(models.target, x_r, r, batch.labels, grad=False)
    gap = models.student.value(x_t, t, batch.labels) - models.target.value(x_r, r, batch.labels)
    torch.testing.assert_close(loss.per_sample, (gap**2).mean((1, 2, 3)))
    torch.testing.assert_close(loss.sigma.double(), t)
    assert loss.scalars == {} and not any(call.grad for call in models.teacher.calls)


def consistency_training(method, step, num_scales):
    loss, batch, models, t, eps = ask(method, step=step)
    r, shares = next_lower(t, NOISE.grid(num_scales))
    x_t, x_r = batch.x0 + spread(t) * eps, batch.x0 + spread(r) * eps
    assert is_unit_noise(eps) and asked_once(models.student, x_t, t, batch.labels, grad=True)
    assert asked_once(models.target, x_r, r, batch.labels, grad=False) and models.teacher.calls == []
    torch.testing.assert_close(loss.sigma.double(), t)
    gap = models.student.value(x_t, t, batch.labels) - models.target.value(x_r, r, batch.labels)
    return loss, gap, t, r, shares


@pytest.mark.parametrize(
    ("step", "num_scales", "decay"), [(0, 2, 0.81), (1, 16, 0.9 ** (2 / 15)), (99, 151, 0.9 ** (2 / 150))]
)
def test_ct(step, num_scales, decay):
    loss, gap, *_, shares = consistency_training(CT(), step, num_scales)
    torch.testing.assert_close(loss.per_sample, (gap**2).mean((1, 2, 3)))
    assert (shares > 0).float().mean() > 0.9 and shares.max() < 5 / (num_scales - 1)
    assert loss.scalars == {"num_scales": num_scales, "target_decay": pytest.approx(decay)}


def test_ct_with_a_fixed_grid_and_decay():
    loss, gap, *_ = consistency_training(CT(num_scales=12, target_decay=0.3, distance=Pixelwise(kind="l1")), 50, 12)
    torch.testing.assert_close(loss.per_sample, gap.abs().mean((1, 2, 3)))
    assert loss.scalars == {"num_scales": 12, "target_decay": 0.3}
    assert CT(num_scales=12).target_decay_at(0, 100) == pytest.approx(0.9 ** (2 / 11))
    assert CT(num_scales=12, mu_per_interval=False).target_decay_at(0, 100) == pytest.approx(0.9 ** (2 / 12))


@pytest.mark.parametrize(("step", "num_scales"), [(0, 11), (30, 41)])
def test_ict(step, num_scales):
    method = ICT(p_mean=-0.5, p_std=1.5)
    loss, gap, t, r, shares = consistency_training(method, step, num_scales)
    c = 0.00054 * math.sqrt(12)
    expected = (((gap**2).sum((1, 2, 3)) + c**2).sqrt() - c) / (t - r)
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-4, atol=0)  # t - r of float32 levels
    cdf = torch.distributions.Normal(-0.5, 1.5).cdf(NOISE.grid(num_scales).log())
    mass = cdf[:-1] - cdf[1:]
    torch.testing.assert_close(shares.double(), mass / mass.sum(), rtol=0, atol=0.06)
    assert loss.scalars == {"num_scales": num_scales}


@pytest.mark.parametrize("weighting", ["inverse_gap", "edm"])
@pytest.mark.parametrize("solver", [None, "euler", "heun"])
@pytest.mark.parametrize("mapping", ["sigmoid", "const"])
def test_ect(weighting, solver, mapping):
    method = ECT(
        **{"weighting": weighting, "solver": solver, "mapping": mapping, "guidance": 1.5, "distance": Pixelwise()},
        **{"p_mean": -0.4, "p_std": 1.2, "q": 3.0, "num_stages": 4, "k": 5.0, "b": 0.7},
    )
    loss, batch, models, t, eps = ask(method, step=30)  # stage 1 of 4
    assert abs(t.log().mean() + 0.4) < 0.2 and abs(t.log().std() - 1.2) < 0.15 and is_unit_noise(eps)
    n = 1 + 5.0 / (1 + (0.7 * t).exp()) if mapping == "sigmoid" else torch.ones_like(t)
    r = (t * (1 - n / 9)).clamp(min=0)
    x_t, plain = batch.x0 + spread(t) * eps, solver is None
    if plain:
        x_r = batch.x0 + spread(r) * eps
    else:
        x_r = one_step(solver, lambda x, s: guided(models.teacher, x, s, batch.labels, 1.5), x_t, t, r)
    assert asked_once(models.student, x_t, t, batch.labels, grad=True)
    (call,) = models.target.calls
    torch.testing.assert_close(call.x, x_r, rtol=1e-4, atol=1e-5)  # r is computed in float32
    torch.testing.assert_close(call.sigma.double(), r, rtol=1e-5, atol=1e-6)
    assert torch.equal(call.labels, batch.labels) and not call.grad
    gap = models.student.value(x_t, t, batch.labels) - models.target.value(x_r, r, batch.labels)
    weight = 1 / (t - r) if weighting == "inverse_gap" else 1 / t**2 + 1 / 0.5**2
    torch.testing.assert_close(loss.per_sample, weight * (gap**2).mean((1, 2, 3)), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss.sigma.double(), t)
    assert loss.scalars == {"stage": 1, "gap": pytest.approx(1 / 9)}
    assert not any(call.grad for call in models.teacher.calls) and bool(models.teacher.calls) != plain


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_ect_that_distils_takes_an_euler_step_to_r_zero_and_no_network_there(solver):
    loss, batch, models, t, eps = ask(ECT(solver=solver, p_mean=-1.0, p_std=0.3, distance=Pixelwise()))
    x_t = batch.x0 + spread(t) * eps
    denoised = models.teacher.value(x_t, t, batch.labels)  # an Euler step to 0 is the denoiser's estimate
    gap = models.student.value(x_t, t, batch.labels) - denoised
    torch.testing.assert_close(loss.per_sample, (gap**2).mean((1, 2, 3)) / t, rtol=1e-4, atol=1e-6)
    assert all((call.sigma > 0).all() for network in (models.target, models.teacher) for call in network.calls)


@pytest.mark.parametrize("augmented", [False, True])
def test_edm(augmented):
    method = EDM(p_mean=-0.7, p_std=0.9, augment=Augment(transforms=("xflip",)) if augmented else None)
    batch, model = the_batch(), Toy(0.9)
    if augmented:
        x0 = batch.x0.float().repeat(1, 1, 4, 4)
        batch = batch._replace(x0=x0 + 0.1 * torch.arange(8))
    loss = method.loss(Models(model, Toy(0.1)), batch, context())
    (call,) = model.calls
    t, x0, shown = call.sigma.double(), batch.x0, None
    assert abs(t.log().mean() + 0.7) < 0.15 and abs(t.log().std() - 0.9) < 0.1
    if augmented:
        as_it_is, flipped = ((call.x - x).flatten(1).norm(dim=1) for x in (x0, x0.flip(3)))
        turned = flipped < as_it_is
        shown = nn.functional.pad(turned[:, None].double(), (0, 8))
        low = t < 0.05  # where the noise hides nothing
        assert 0.3 < turned[low].float().mean() < 0.7
        x0 = torch.where(spread(turned), x0.flip(3), x0)
    else:
        low = t > 0
        assert is_unit_noise((call.x - x0) / spread(t))
    gap = model.value(call.x, call.sigma, batch.labels, shown) - x0
    expected = (1 / t**2 + 4) * (gap**2).mean((1, 2, 3))
    torch.testing.assert_close(loss.per_sample[low], expected[low], rtol=1e-5, atol=0)
    assert torch.equal(call.labels, batch.labels) and call.grad
    torch.testing.assert_close(loss.sigma.double(), t)


def test_edm2_divides_the_loss_by_its_learned_uncertainty_and_adds_that():
    model, batch = Toy(0.9), the_batch()
    assert EDM().build_weighting() is None
    plain = EDM(p_mean=-0.8).loss(Models(model, model), batch, context())
    weighting = EDM(adaptive_weight=True).build_weighting()
    with torch.no_grad():
        weighting.linear.weight.fill_(0.01)  # as one step of Adam at EDM2's rate may
        assert weighting(plain.sigma).abs().max() < 0.12
        weighting.linear.weight.normal_()
    method = EDM(p_mean=-0.8, adaptive_weight=True)
    found = method.loss(Models(model, model, weighting=weighting), batch, context())
    u = -weighting(plain.sigma)
    torch.testing.assert_close(found.per_sample, plain.per_sample / u.exp() + u)
    assert torch.equal(found.sigma, plain.sigma)


def test_edm_draws_the_noise_whether_labels_are_hidden_or_not_and_hides_none_without_labels():
    model = Toy(0.9)
    EDM(label_dropout=1.0).loss(Models(model, model), the_batch(), context())
    EDM(label_dropout=0.5).loss(Models(model, model), the_batch()._replace(labels=None), context())
    assert (model.calls[0].labels == -1).all() and model.calls[1].labels is None


@pytest.mark.parametrize(("step", "intervals", "guidance"), [(0, 4, 2.0), (30, 2, 1.0), (99, 1, 1.0)])
def test_pd(step, intervals, guidance):
    loss, batch, models, t, eps = ask(PD(start_steps=4, guidance=2.0), step=step)
    grid = NOISE.grid(2 * intervals + 1).float().double()
    index = (t[:, None] - grid).abs().argmin(1)
    assert set(index.tolist()) == set(range(0, 2 * intervals, 2)) and is_unit_noise(eps)
    assert torch.bincount(index // 2).min() > 0.7 * SIZE / intervals
    torch.testing.assert_close(t, grid[index])
    middle, r, x_t = grid[index + 1], grid[index + 2], batch.x0 + spread(t) * eps

    def denoise(x, sigma):
        return guided(models.teacher, x, sigma, batch.labels, guidance)

    x_r = one_step("euler", denoise, one_step("euler", denoise, x_t, t, middle), middle, r)
    target = (x_r - spread(r / t) * x_t) / spread(1 - r / t)  # x0 with x_r = x0 + r / t (x_t - x0)
    gap = models.student.value(x_t, t, batch.labels) - target
    expected = (1 / t**2).clamp(min=1) * (gap**2).mean((1, 2, 3))
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-4, atol=1e-6)
    assert asked_once(models.student, x_t, t, batch.labels, grad=True) and models.target.calls == []
    assert not any(call.grad for call in models.teacher.calls) and loss.scalars == {"num_intervals": intervals}
    torch.testing.assert_close(loss.sigma.double(), t)


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("tangent", ["normalise", "clip"])
@pytest.mark.parametrize(("step", "warmup", "share"), [(0, 0, 1.0), (0, 40, 0.0), (10, 40, 0.25), (50, 40, 1.0)])
def test_scm(distil, tangent, step, warmup, share):
    method = SCM(distil=distil, tangent=tangent, guidance=1.5, p_mean=-0.6, p_std=1.1, warmup_steps=warmup)
    loss, batch, models, *_ = ask(method, step=step, weighting=lambda sigma: 0.3 * sigma.log())
    sigma = loss.sigma.double()
    assert abs(sigma.log().mean() + 0.6) < 0.15 and abs(sigma.log().std() - 1.1) < 0.12
    *_, last = models.student.calls
    angle = (sigma / 0.5).atan()
    cos, sin = spread(angle.cos()), spread(angle.sin())
    x_t = 0.5 * last.x
    eps = (x_t - cos * batch.x0) / (0.5 * sin)
    assert is_unit_noise(eps) and torch.equal(last.labels, batch.labels) and last.grad
    dx = cos * 0.5 * eps - sin * batch.x0
    if distil:
        x_sigma = batch.x0 + spread(sigma) * eps
        x0_hat = guided(models.teacher, x_sigma, sigma, batch.labels, 1.5)
        dx = (cos * x_t - x0_hat) / sin

    def network(x, angle):
        return -models.student.value(x / 0.5, 0.5 * angle.tan(), batch.labels).cos().detach()

    h = 1e-6
    df = (network(x_t + h * dx, angle + h) - network(x_t - h * dx, angle - h)) / (2 * h)
    f = network(x_t, angle)
    g = -(cos**2) * (0.5 * f - dx) - share * (cos * sin * x_t + 0.5 * cos * sin * df)
    norm = spread((g**2).sum((1, 2, 3)).sqrt())
    g = g / (norm + 0.1) if tangent == "normalise" else g.clamp(-1, 1)
    expected = sigma**0.3 * (g**2).mean((1, 2, 3)) - 0.3 * sigma.log()  # F and F_minus have the same value
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-3, atol=1e-4)
    assert loss.scalars == {"tangent_share": share}
    assert bool(models.teacher.calls) == distil and not any(call.grad for call in models.teacher.calls)


def test_scm_gradient_pulls_the_network_along_the_tangent():
    loss, batch, models, *_ = ask(SCM(), step=20_000)
    (found,) = torch.autograd.grad(loss.per_sample.sum(), models.student.gain)
    same = context()
    torch.randn(SIZE, generator=same.generator)  # the noise levels
    x_in, _, g = SCM().tangent_at(models, batch, same, loss.sigma, 1.0)
    f = -models.student.raw(x_in, loss.sigma, batch.labels)
    (expected,) = torch.autograd.grad(-2 * (f * SCM().bound(g).detach()).mean((1, 2, 3)).sum(), models.student.gain)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_scm_has_a_learned_weight_if_asked_for():
    assert SCM().build_weighting()(torch.ones(3)).tolist() == [0, 0, 0]
    assert SCM(adaptive_weight=False).build_weighting() is None


def derivative_along(models, batch, x, dx, t, h):
    def f(x, t):
        return models.student.value(x, t, batch.labels)

    ahead, behind = (f(x + c * spread(h * t) * dx, t * (1 + c * h)) for c in (1, -1))
    return (ahead - behind) / spread(2 * h * t)


@pytest.mark.parametrize(
    ("method", "stopped"),
    [
        (CMInf(guidance=1.5), True),
        (CMInf(guidance=1.5, distance=PseudoHuber(c_per_sqrt_dim=0.1)), True),
        (CMInf(distil=False), True),
        (CMInf(guidance=1.5, stop_gradient=False), False),
        (CMInf(guidance=1.5, stop_gradient=False, distance=Pixelwise(kind="l1")), False),
    ],
    ids=["l2", "huber", "isolated", "through-l2", "through-l1"],
)
def test_cm_inf(method, stopped):
    loss, batch, models, t, eps = ask(method)
    assert is_unit_noise(eps) and ((t >= 0.002) & (t <= 80.001)).all()
    u = (t ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert abs(u.mean() - 0.5) < 0.05 and abs(u.var() - 1 / 12) < 0.01
    x_t = batch.x0 + spread(t) * eps
    dx = (x_t - guided(models.teacher, x_t, t, batch.labels, 1.5)) / spread(t) if method.distil else eps
    v = derivative_along(models, batch, x_t, dx, t, torch.full_like(t, 1e-5))
    if stopped:
        pull = 2 * v / 12 if method.distance.kind == "l2" else v / (0.1 * math.sqrt(12))
        expected = (models.student.value(x_t, t, batch.labels) * pull).sum((1, 2, 3))
    else:
        expected = (v.abs() if method.distance.kind == "l1" else v**2).mean((1, 2, 3))
    torch.testing.assert_close(loss.per_sample, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.sigma.double(), t)
    assert [call.grad for call in models.student.calls] == ([False, True] if stopped else [True])
    assert bool(models.teacher.calls) == method.distil and not any(call.grad for call in models.teacher.calls)
    assert models.target.calls == [] and all(torch.equal(c.labels, batch.labels) for c in models.student.calls)


def test_cm_inf_stays_within_the_range_of_noise():
    ends = warp(torch.tensor([-0.1, 0.0, 1.0, 1.1]), NOISE)
    assert ends.tolist() == pytest.approx([0.002, 0.002, 80, 80], rel=1e-6)
    assert ends[0] >= torch.tensor(NOISE.sigma_min) and ends[-1] <= NOISE.sigma_max


def test_hessian_products_need_no_gradient_of_the_callers():
    at = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        product = hessian_product(Pixelwise().build((3,)), at, torch.ones(2, 3, requires_grad=True))
    assert not product.requires_grad and at.grad is None
    plain = torch.ones(2, 3)
    hessian_product(Pixelwise().build((3,)), plain, plain)
    assert not plain.requires_grad
    torch.testing.assert_close(product, torch.full((2, 3), 2 / 3))


HOOKS = {  # starts from, forward mode, needs a teacher, keeps a target, replaces the teacher
    "cd": ("teacher", False, True, False, False),
    "cd-ema": ("teacher", False, True, True, False),
    "ct": ("random", False, False, True, False),
    "ict": ("random", False, False, False, False),
    "ect": ("teacher", False, False, False, False),
    "ect-const-edm": ("teacher", False, False, False, False),
    "ect-distil": ("teacher", False, True, False, False),
    "pd": ("teacher", False, True, False, True),
    "scm": ("teacher", True, False, False, False),
    "scm-distil": ("teacher", True, True, False, False),
    "cm_inf": ("teacher", True, True, False, False),
    "cm_inf-isolated": ("teacher", True, False, False, False),
    "cm_inf-through": ("teacher", True, True, False, False),
    "meanflow": ("random", True, False, False, False),
    "meanflow-predicted": ("random", True, False, False, False),
    "dmd": ("teacher", False, True, False, False),
    "sid": ("teacher", False, True, False, False),
    "cmt": ("teacher", False, True, False, False),
    "cmt-heun": ("teacher", False, True, False, False),
    "tcm": ("random", False, False, False, False),
    "tcm-gap": ("random", False, False, False, False),
}


@pytest.mark.parametrize("name", STUDENT_METHODS)
def test_what_a_method_asks_of_its_training(name):
    method = STUDENT_METHODS[name]
    asked = method.starts_from, method.forward_mode, method.needs_teacher, method.keeps_target, method.replaces_teacher
    assert asked == HOOKS[name] and method.needs_base == name.startswith("tcm")
    assert method.batch_multiple == {"cmt": 8, "cmt-heun": 4}.get(name, 1)
    decay = {"cd-ema": 0.9, "ct": pytest.approx(0.9 ** (2 / 14))}.get(name, 0.0)
    assert method.target_decay_at(50, 100) == decay
    if name != "pd":
        assert method.learning_rate_factor(50, 100) == 1 and method.euler_steps_at(50, 100) == 1
        assert not method.replaces_teacher_at(50, 100)
    if not name.startswith("scm"):
        assert method.build_weighting() is None


def test_forms_are_those_of_the_papers():
    forms = {kind().kind: kind().form for kind in (EDM, CD, CT, ICT, ECT, PD, SCM, CMInf, MeanFlow, DMD, CMT, TCM)}
    assert forms == {
        **{"edm": "denoiser", "cd": "skip", "ct": "skip", "ict": "skip", "ect": "unshifted", "pd": "euler"},
        **{"scm": "unshifted", "cm_inf": "skip", "meanflow": "average_velocity", "dmd": "generator"},
        **{"cmt": "unshifted", "tcm": "unshifted"},
    }
    assert EDM().starts_from == "random" and not EDM().needs_teacher and not EDM().keeps_target


def test_a_loss_cannot_exchange_the_networks_or_the_step():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Models(Toy(1.0), Toy(1.0)).student = Toy(2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        context().step = 1


def test_a_method_without_loss_says_so():
    with pytest.raises(TypeError, match="Method defines no loss"):
        Method(kind="none").loss(None, None, None)


def test_rounds_of_pd():
    method = PD(start_steps=4)
    assert [method.euler_steps_at(step, 60) for step in (0, 1, 12, 13, 36, 37, 60)] == [4, 4, 4, 2, 2, 1, 1]
    assert [method.euler_steps_at(step, 5) for step in (0, 1, 2, 3, 4)] == [4, 4, 2, 2, 1]  # the first lasts one step
    assert [method.replaces_teacher_at(step, 5) for step in range(5)] == [False, True, False, True, False]
    assert method.learning_rate_factor(6, 60) == 0.5 and PD(anneal=False).learning_rate_factor(6, 60) == 1


def test_the_grid_on_a_device_is_float32_and_computed_once():
    grid = grid_on(NOISE, 40, CPU)
    assert grid.dtype == torch.float32 and grid is grid_on(NOISE, 40, CPU)
    torch.testing.assert_close(grid, NOISE.grid(40).float(), rtol=0, atol=0)


def test_noise_is_the_generators_in_the_images_type():
    x0 = torch.zeros(4, 3, 2, 2, dtype=torch.float64)
    found = draw_eps(x0, torch.Generator().manual_seed(3))
    assert torch.equal(found, torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


def test_a_teacher_sees_the_labels_of_the_batch():
    models, batch = Models(Toy(1.0), Toy(1.0), Toy(0.5)), the_batch()
    found = teacher_of(models, batch, 1.0)(batch.x0, torch.ones(SIZE))
    torch.testing.assert_close(found, models.teacher.value(batch.x0, torch.ones(SIZE), batch.labels))


def test_derivatives_pass_through_attention():
    x, dx = torch.randn(2, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def attend(x):
        return nn.functional.scaled_dot_product_attention(x, x.sin(), x.cos())

    value, found = derivative(attend, (x,), (dx,))
    torch.testing.assert_close(value, attend(x))
    expected = (attend(x + 1e-6 * dx) - attend(x - 1e-6 * dx)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@every_method
def test_losses_need_no_labels(method):
    models = networks(method.distance.build(SHAPE) if hasattr(method, "distance") else None)
    assert method.loss(models, the_batch()._replace(labels=None), context()).per_sample.isfinite().all()


def networks(distance):
    return Models(Toy(0.9), Toy(0.7), Toy(0.5), distance, score=Toy(0.4), base=Toy(0.3))


@pytest.mark.parametrize("name", [*STUDENT_METHODS, "edm"])
def test_losses_draw_from_the_steps_generator_alone(name):
    augment = Augment(transforms=("xflip",))
    method = STUDENT_METHODS.get(name) or EDM(label_dropout=0.5, augment=augment)
    distance = method.distance.build((3, 8, 8)) if hasattr(method, "distance") else None
    batch = Batch(the_batch().x0.repeat(1, 1, 4, 4), the_batch().labels)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(method.loss(networks(distance), batch, context(seed=3)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0].per_sample, found[1].per_sample) and torch.equal(found[0].sigma, found[1].sigma)
    other = method.loss(networks(distance), batch, context(seed=4))
    assert not torch.equal(other.per_sample, found[0].per_sample)


def test_the_learned_weight_is_a_sum_of_cosines_of_the_noise_label():
    torch.manual_seed(0)
    weight = LogWeight()
    with torch.no_grad():
        weight.linear.weight.normal_()
    sigma = torch.tensor([0.02, 1.0, 30.0])
    told, parts = sigma.log() / 4, zip(weight.linear.weight[0], weight.frequencies, weight.phases, strict=True)
    expected = sum(w * math.sqrt(2) * (told * frequency + phase).cos() for w, frequency, phase in parts)
    torch.testing.assert_close(weight(sigma), expected, rtol=1e-4, atol=1e-4)
    assert weight(sigma).shape == (3,) and len(weight.phases) == 128 and weight.linear.bias is None
    assert weight.frequencies.std().item() == pytest.approx(2 * math.pi, rel=0.2)
    assert 0 <= weight.phases.min() < 0.5 and 5.8 < weight.phases.max() <= 2 * math.pi
