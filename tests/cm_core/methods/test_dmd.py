"""Distribution matching: gradients on Gaussians, losses computed a second time, and who learns at which step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cm_core.methods.base import Models
from cm_core.methods.dmd import DMD, logits_of
from cm_core.model import ModelSpec
from cm_core.networks import MLPParams
from cm_core.noise import Noise
from cm_core.sampling import ImageNoise
from flows.stages.models import few_steps
from method_oracles import CPU, NOISE, context, gaussian_batch
from oracles import GaussianDenoiser
from tiny_training import METHODS, Training
from toy_networks import Toy, is_unit_noise, spread, the_batch


class ShiftedGenerator(nn.Module):
    """Images of N(mean, 0.5^2) from noise at the highest level."""

    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

    def forward(self, x, sigma, labels=None):
        return self.mean + 0.5 * x / spread(sigma)


class ShiftedDenoiser(GaussianDenoiser):
    """The exact denoiser of N(mean, 0.5^2)."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, x, sigma, labels=None):
        return self.mean + super().forward(x - self.mean, sigma)


@pytest.mark.parametrize("objective", ["vsd", "sid"])
@pytest.mark.parametrize("mean", [0.0, 0.4, -0.3])
def test_the_gradient_pulls_a_shifted_generator_to_the_data_and_vanishes_there(objective, mean):
    """With exact scores both are linear: D - S = -(1 - c) mean, c = 0.25 / (0.25 + t^2), whatever the image."""
    method, seen = DMD(objective=objective, gan_weight=0), {}

    class Teacher(GaussianDenoiser):
        def forward(self, x, sigma, labels=None):
            seen["x_t"], seen["t"] = x.detach(), sigma
            return super().forward(x, sigma)

    student = ShiftedGenerator(mean)
    student.register_forward_hook(lambda module, args, out: seen.update(made=out.detach()))
    models = Models(student, student, Teacher(), score=ShiftedDenoiser(mean))
    method.loss(models, gaussian_batch(2048), context()).per_sample.mean().backward()
    t = seen["t"].double()
    c = 0.25 / (0.25 + t**2)
    weight = 1 / (seen["made"] - spread(c) * seen["x_t"]).abs().mean((1, 2, 3))
    slope = (1 - c) * mean if objective == "vsd" else (1 - c) ** 2 * mean
    torch.testing.assert_close(student.mean.grad, (weight * slope).mean(), rtol=1e-5, atol=1e-12)
    assert student.mean.grad.sign() == torch.tensor(mean).sign()


def ask(method, step, discriminator=None):
    """Return loss, batch, networks and the student's one call, its image and the noise level of the loss."""
    student, score, batch = Toy(0.9), Toy(0.4), the_batch()
    models = Models(student, student, Toy(0.5), score=score, discriminator=discriminator)
    loss = method.loss(models, batch, context(step))
    (call,) = student.calls
    assert torch.equal(call.labels, batch.labels)
    sigma = method.generator_sigma or NOISE.sigma_max
    assert (call.sigma == sigma).all() and is_unit_noise(call.x / sigma)
    return loss, batch, models, student.value(call.x, call.sigma, call.labels), loss.sigma.double()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_vsd(guidance):
    loss, batch, models, made, t = ask(DMD(gan_weight=0, guidance=guidance), step=5)
    (call,) = models.score.calls
    x_t = call.x
    assert is_unit_noise((x_t - made) / spread(t)) and not call.grad and torch.equal(call.labels, batch.labels)
    real = models.teacher.value(x_t, t, batch.labels)
    if guidance != 1:
        without = models.teacher.value(x_t, t, torch.full_like(batch.labels, -1))
        real = without + guidance * (real - without)
    weight = 1 / (made - real).abs().mean((1, 2, 3))
    gradient = spread(weight) * (models.score.value(x_t, t, batch.labels) - real)
    torch.testing.assert_close(loss.per_sample, gradient.square().mean((1, 2, 3)) / 2, rtol=1e-5, atol=1e-9)
    (found,) = torch.autograd.grad(loss.per_sample.sum(), models.student.gain)
    expected = (gradient.detach() * made / models.student.gain).mean((1, 2, 3)).sum().detach()  # made is gain * h(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_sid_and_its_gradient_through_both_denoisers():
    method = DMD(objective="sid", gan_weight=0, generator_sigma=2.5, alpha=1.1, u_min=0, u_max=0.8)
    loss, batch, models, made, t = ask(method, step=5)
    (call,) = models.score.calls
    eps = ((call.x - made) / spread(t)).detach()
    assert is_unit_noise(eps) and call.grad

    def value():
        again = models.student.value(*models.student.calls[0][:3])
        x_t = again + spread(t) * eps
        real, fake = (net.value(x_t, t, batch.labels) for net in (models.teacher, models.score))
        weight = 1 / (again - real).abs().mean((1, 2, 3)).detach()
        return weight * ((real - fake) * ((fake - again) + (1 - 1.1) * (real - fake))).mean((1, 2, 3))

    torch.testing.assert_close(loss.per_sample, value(), rtol=1e-5, atol=1e-9)
    found, expected = (torch.autograd.grad(v.sum(), models.student.gain)[0] for v in (loss.per_sample, value()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    highest = 0.8 * 80 ** (1 / 7) + 0.2 * 0.002 ** (1 / 7)
    assert 0.9 * highest**7 < t.max() <= highest**7 * (1 + 1e-6)


@pytest.mark.parametrize("score_loss", ["plain", "edm"])
def test_the_score_learns_the_students_images_at_the_steps_between(score_loss):
    method = DMD(gan_weight=0, score_loss=score_loss)
    for step in (1, 4, 6):
        loss, batch, models, made, t = ask(method, step)
        (call,) = models.score.calls
        assert call.grad and not models.student.calls[0].grad and not models.teacher.calls
        assert is_unit_noise((call.x - made) / spread(t))
        weight = (t**2 + 0.25) / (0.5 * t) ** 2 if score_loss == "edm" else torch.ones_like(t)
        expected = weight * (models.score.value(call.x, t, batch.labels) - made).square().mean((1, 2, 3))
        torch.testing.assert_close(loss.per_sample, expected, rtol=1e-5, atol=1e-9)
    if score_loss == "edm":
        assert abs(t.log().mean() + 1.2) < 0.2 and abs(t.log().std() - 1.2) < 0.2


class Judge(Toy):
    """A discriminator of two logits, and the scalings of a network that takes images as they are."""

    def scalings(self, sigma):
        return torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma)

    def raw(self, x_in, sigma, labels=None):
        return self.forward(x_in, sigma, labels).flatten(1)[:, :2]


def test_the_adversarial_losses():
    method, judge = DMD(gan_weight=0.3), Judge(1.5)
    loss, batch, models, made, t = ask(method, 0, judge)
    (call,) = judge.calls
    assert torch.equal(call.x, models.score.calls[0].x) and torch.equal(call.labels, batch.labels) and call.grad
    plain, *_ = ask(method.model_copy(update={"gan_weight": 0.0}), 0)
    logits = judge.value(call.x, t, batch.labels).flatten(1)[:, :2]
    torch.testing.assert_close(
        loss.per_sample, plain.per_sample + 0.3 * (1 + (-logits).exp()).log().mean(1), rtol=1e-6, atol=1e-9
    )

    judge.calls.clear()
    loss, batch, models, made, t = ask(method, 1, judge)
    (call,) = judge.calls  # one pass, an image's two rows adjacent
    fake, real = call.x[0::2], call.x[1::2]
    t_real = call.sigma[1::2].double()
    assert torch.equal(fake, models.score.calls[0].x) and torch.equal(call.sigma[0::2].double(), t)
    assert is_unit_noise((real - batch.x0) / spread(t_real)) and not torch.equal(t, t_real)
    assert torch.equal(call.labels, batch.labels.repeat_interleave(2))
    logits = judge.value(call.x, call.sigma, call.labels).flatten(1)[:, :2]
    adversarial = F.softplus(logits[0::2]).mean(1) + F.softplus(-logits[1::2]).mean(1)
    plain, *_ = ask(method.model_copy(update={"gan_weight": 0.0}), 1)
    torch.testing.assert_close(loss.per_sample, plain.per_sample + adversarial, rtol=1e-6, atol=1e-9)


def test_the_discriminator_sees_every_resolution_of_the_teacher_and_trains_its_heads_alone():
    training = Training(METHODS["dmd"])
    teacher, discriminator = training.models.teacher, training.models.discriminator
    x = torch.randn(4, 1, 8, 8, requires_grad=True)
    logits = logits_of(discriminator, x, torch.full((4,), 2.0), None)
    assert logits.shape == (4, 1)  # one resolution, one pixel
    logits.sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())
    assert not any(name.startswith("net._frozen") for name in discriminator.state_dict())
    with torch.no_grad():
        teacher.net.unet.input.weight.mul_(3)  # features change with the teacher
        assert not torch.allclose(logits_of(discriminator, x, torch.full((4,), 2.0), None), logits)


@pytest.mark.parametrize("name", ["dmd", "dmd-guided", "sid"])
def test_at_each_step_one_learns_and_the_other_keeps_its_bits(name):
    training = Training(METHODS[name], num_steps=7)
    student, critic = ("model/", "ema", "optimizer/"), ("score/", "discriminator/", "critic/")
    before, seen = training.tensors(), []
    for entry in training.steps():
        after = training.tensors()
        step, cycle = entry["step"] - 1, training.method.cycle
        learns, rests = (student, critic) if step % cycle == 0 else (critic, student)
        changed = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
        assert not [key for key in changed if key.startswith(rests)]
        assert {start for start in learns if any(key.startswith(start) for key in after)} == {
            start for start in learns if any(key.startswith(start) for key in changed)
        }
        assert ("loss" in entry) == (step % cycle == 0) == ("critic_loss" not in entry)
        assert all(p.grad is None for learner in training.state.learners for p in learner.parameters())
        before, seen = after, [*seen, step % cycle == 0]
    assert True in seen and False in seen


def test_an_overflow_of_the_critic_leaves_the_students_loss_scale():
    training = Training(METHODS["dmd"], precision="fp16", num_steps=2)
    training.state.critic.loss_scale.scale.fill_(2.0**120)
    first, second = training.steps()
    assert first["skipped_steps"] == second["skipped_steps"] == 0 and second["critic_skipped_steps"] == 1
    assert second["loss_scale"] == 2.0**16 and second["critic_loss_scale"] == 2.0**119


def test_a_generator_is_asked_at_its_own_level_once():
    spec = ModelSpec(form="generator", network=MLPParams(width=8), noise=Noise(), image_shape=(1, 2, 2))
    for sigma in (None, 2.5):
        told, seen = spec.model_copy(update={"generator_sigma": sigma}), []
        few_steps(told, lambda x, t, seen=seen: seen.append((x, t)) or 0 * x, ImageNoise(0, range(64), (1, 2, 2), CPU))
        ((x, t),) = seen
        assert (t == (sigma or 80)).all() and abs(x.std() / (sigma or 80) - 1) < 0.2
    assert not told.is_consistency_function and told.fixed_steps == 1
