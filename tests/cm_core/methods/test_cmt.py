"""CMT: trajectories of the exact teacher end where the exact consistency function says; what the networks are asked."""

import pytest
import torch

from cm_core.distances import Pixelwise
from cm_core.methods.base import Models
from cm_core.methods.cmt import CMT
from cm_core.training.config import Train
from flows.stages.student import Student
from method_oracles import NOISE, context, gaussian_batch, oracle_models
from oracles import GaussianConsistency, GaussianDenoiser
from toy_networks import SHAPE, SIZE, Toy, is_unit_noise, spread, the_batch


@pytest.mark.parametrize("solver", ["dpmpp", "heun"])
def test_the_residual_of_the_exact_solution_falls_with_the_solvers_order(solver):
    residuals = []
    for num_steps in (64, 128):
        method = CMT(num_steps=num_steps, solver=solver, distance=Pixelwise(kind="l1"))
        loss = method.loss(oracle_models(method), gaussian_batch(64 * num_steps), context())
        residuals.append(loss.per_sample.mean().item())
    assert residuals[0] / residuals[1] == pytest.approx(4, rel=0.15) and residuals[1] < 1e-3


def test_the_papers_steps_deviate_from_the_exact_flow_by_less_than_eulers():
    """16 steps from 80 to 0.002: the multistep solver's end against that of the same calls by Euler."""
    method, f = CMT(), GaussianConsistency(NOISE)
    sigmas = method.levels(NOISE)
    x = torch.full((1, 1), 80.0, dtype=torch.float64)
    exact = f(x, sigmas[:1])
    *_, end = method.trajectory(GaussianDenoiser(), x, sigmas)
    euler = x
    for t, r in zip(sigmas[:-1, None], sigmas[1:, None], strict=True):
        euler = r / t * euler + (1 - r / t) * GaussianDenoiser()(euler, t[0])
    assert (sigmas[0], sigmas[-1]) == (80, 0.002) and (sigmas[:-1] / sigmas[1:]).std() < 1e-12
    assert abs(end / exact - 1) < 0.05 < abs(euler / exact - 1)


def walk(denoise, x, sigmas, solver):
    """The states of a trajectory by the formulas of the papers, in lambda = -ln sigma."""
    states, before = [x], None
    for t, r in zip(sigmas[:-1], sigmas[1:], strict=True):
        x, now = states[-1], denoise(states[-1], t)
        if solver == "heun":
            slope = (x - now) / t
            ahead = x + (r - t) * slope
            states.append(x + (r - t) * (slope + (ahead - denoise(ahead, r)) / r) / 2)
            continue
        h, d = (t / r).log(), now
        if before is not None:
            k = before[1] / h
            d = (1 + 1 / (2 * k)) * now - before[0] / (2 * k)
        states.append(r / t * x - ((-h).exp() - 1) * d)
        before = now, h
    return states


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize(("solver", "calls"), [("dpmpp", 6), ("heun", 12)])
def test_each_point_of_a_trajectory_is_regressed_on_its_end(solver, calls, guidance):
    method, batch = CMT(num_steps=6, solver=solver, guidance=guidance), the_batch()
    models = Models(Toy(0.9), Toy(0.7), Toy(0.5), method.distance.build(SHAPE))
    loss = method.loss(models, batch, context())
    (call,) = models.student.calls
    assert len(models.teacher.calls) == calls and not any(one.grad for one in models.teacher.calls) and call.grad
    sigmas = method.levels(NOISE).float().double()
    torch.testing.assert_close(call.sigma.double(), sigmas[:-1].repeat(SIZE // 6))
    labels = batch.labels[::6]
    assert torch.equal(call.labels, labels.repeat_interleave(6)) and models.target.calls == []
    assert is_unit_noise(call.x[::6] / 80)

    def denoise(x, sigma):
        with_label, without = (
            models.teacher.value(x, sigma.expand(len(x)), shown) for shown in (labels, torch.full_like(labels, -1))
        )
        return without + guidance * (with_label - without)

    *points, end = walk(denoise, call.x[::6].double(), sigmas, solver)
    torch.testing.assert_close(call.x, torch.stack(points, 1).flatten(0, 1), rtol=1e-5, atol=1e-5)
    gap = models.student.value(call.x, call.sigma, call.labels) - end.repeat_interleave(6, 0)
    torch.testing.assert_close(loss.per_sample, (gap**2).mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    assert torch.equal(loss.sigma, call.sigma) and loss.scalars == {}
    assert spread(loss.sigma).shape == (SIZE, 1, 1, 1)


def test_the_images_are_not_looked_at():
    method, batch = CMT(num_steps=6), the_batch()
    models = Models(Toy(0.9), Toy(0.7), Toy(0.5), method.distance.build(SHAPE))
    losses = [method.loss(models, batch._replace(x0=x0), context()).per_sample for x0 in (batch.x0, 0 * batch.x0)]
    assert torch.equal(*losses)


def test_a_batch_is_a_whole_number_of_trajectories():
    with pytest.raises(ValueError, match=r"train.batch_size=100 must be a multiple of method.num_steps=16"):
        Student(method=CMT(), train=Train(batch_size=100))
    assert Student(method=CMT(), train=Train(batch_size=96)).method.batch_multiple == 16
