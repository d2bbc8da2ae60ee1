"""Students that take the weight of guidance as an input: their start, their training, and where it leads."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from cm_core.guidance import guided
from cm_core.methods.base import Batch, Models
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf
from cm_core.methods.dmd import DMD
from cm_core.methods.ect import ECT
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.model import ModelSpec, build_seeded, save_model
from cm_core.networks import MLPParams
from cm_core.noise import Noise
from cm_core.sampling import ImageNoise
from cm_core.solvers import STEPS
from cm_core.tensors import expand_like
from cm_core.training.batches import Batches
from cm_core.training.config import Train
from cm_core.training.cost import step_cost
from cm_core.training.ema import ConstantEma
from cm_core.training.optimizers import Optimizer
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from flows.stages.models import initial_student
from method_oracles import CPU, SHORT, context, distance_of, gaussian_batch, shake
from small_networks import small_networks
from toy_networks import Toy

RANGE, OWN = (0.5, 4.0), 1.0
WEIGHTS = (0.5, 1.0, 2.5)
NETWORKS = {**small_networks(), "mlp": MLPParams(width=16, depth=1)}
every_network = pytest.mark.parametrize("name", NETWORKS)


def spec_of(network, form="unshifted", **changes):
    told = {"guidance_range": RANGE, "guidance": OWN, "num_classes": 3, "image_shape": (1, 8, 8)} | changes
    return ModelSpec(form=form, network=network, noise=Noise(), **told)


def started(network, folder):
    """Return a teacher and a student that starts from its weights, in eval mode."""
    teacher_spec = spec_of(network, "denoiser", guidance_range=None, guidance=None)
    teacher = build_seeded(teacher_spec, 0)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    save_model(folder, teacher_spec, teacher.state_dict())
    student = initial_student(spec_of(network), init_from="teacher", seed=1, earlier={"teacher": folder})
    return teacher.eval(), student.eval()


def some_images():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0.3, 2.0, 9.0]), torch.tensor([0, -1, 2])


@every_network
def test_a_student_starts_as_its_teacher_whatever_the_weight(tmp_path, name):
    teacher, student = started(NETWORKS[name], tmp_path)
    x, sigma, labels = some_images()
    with torch.no_grad():
        expected = teacher(x, sigma, labels)
        for weight in (None, *WEIGHTS, torch.tensor(WEIGHTS)):
            assert torch.equal(student(x, sigma, labels, guidance=weight), expected)
    assert student.state_dict().keys() - teacher.state_dict().keys() == added(student)


def added(student):
    return {name for name in student.state_dict() if ".guidance." in name}


@every_network
def test_gradients_reach_the_layer_and_then_each_image_has_its_own_weight(tmp_path, name):
    _, student = started(NETWORKS[name], tmp_path)
    x, sigma, labels = some_images()
    student(x, sigma, labels, guidance=torch.tensor(WEIGHTS)).square().sum().backward()
    layer = [p for n, p in student.named_parameters() if ".guidance." in n]
    assert layer and any(p.grad.abs().max() > 0 for p in layer)
    with torch.no_grad():
        for p in layer:
            p.add_(10 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
        together = student(x, sigma, labels, guidance=torch.tensor(WEIGHTS))
        for row, weight in enumerate(WEIGHTS):
            alone = student(x, sigma, labels, guidance=weight)
            torch.testing.assert_close(together[row], alone[row], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(together[row - 1], alone[row - 1], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(student(x, sigma, labels), student(x, sigma, labels, guidance=OWN))


def test_a_network_without_that_input_refuses_a_weight():
    model = build_seeded(spec_of(NETWORKS["mlp"], guidance_range=None, guidance=None), 0)
    x, sigma, labels = some_images()
    with pytest.raises(ValueError, match="a network that takes none as an input"):
        model(x, sigma, labels, guidance=2.0)


METHODS = {
    "cd": (CD, {}, 0),
    "ect": (ECT, {"solver": "heun"}, 0),
    "scm": (SCM, {"distil": True}, 50),
    "cm_inf": (CMInf, {}, 0),
    "cm_inf-through": (CMInf, {"stop_gradient": False}, 0),
    "pd": (PD, {"start_steps": 4}, 0),
    "pd-later": (PD, {"start_steps": 4}, 99),
    "dmd": (DMD, {"gan_weight": 0}, 0),
    "dmd-critic": (DMD, {"gan_weight": 0}, 1),
    "sid": (DMD, {"gan_weight": 0, "objective": "sid"}, 0),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_image_is_trained_at_its_own_weight(name):
    """An image's loss is that of the method with this one weight, and of networks that are told it."""
    kind, settings, step = METHODS[name]
    weights = torch.tensor(WEIGHTS * 4)
    batch = gaussian_batch(len(weights), (1, 2, 2))._replace(labels=torch.arange(len(weights)) % 3)
    student, target, score, later = (model(seed, kind) for seed in range(4))
    teacher = later if name == "pd-later" else Toy(0.5)

    def losses(method, own, batch):
        for one in (student, target, score, later):
            one.guidance = own
        models = Models(student, target, teacher, distance_of(method), score=score)
        return method.loss(models, batch, context(step)).per_sample

    found = losses(kind(**settings, guidance=OWN, guidance_range=RANGE), 4.0, batch._replace(guidance=weights))
    plain = [losses(kind(**settings, guidance=weight), weight, batch) for weight in WEIGHTS]
    expected = torch.stack(plain)[torch.arange(len(weights)) % 3, torch.arange(len(weights))]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(plain[0], plain[2], rtol=1e-3), "the weight matters"


def model(seed, kind):
    spec = spec_of(MLPParams(width=16, depth=1), kind.model_construct().form, image_shape=(1, 2, 2))
    made = build_seeded(spec, seed).double()
    shake(made)
    return made.eval()


def batches(seed=3, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 1, 1, 1), dtype=np.uint8)
    return Batches(pixels, np.arange(2000) % 3, batch_size=1000, seed=seed, device=CPU, **options)


def test_weights_are_uniform_and_a_function_of_seed_and_step():
    drawn, plain = batches(guidance_range=(1.5, 6.0)), batches()
    first, later = drawn.at(0), drawn.at(7)
    shares = (first.guidance.sort().values - 1.5) / 4.5
    assert 0 <= shares[0] and shares[-1] <= 1 and first.guidance.dtype == torch.float32
    assert (shares - torch.linspace(0, 1, 1000)).abs().max() < 0.06  # Kolmogorov and Smirnov's bound at 0.1 %
    assert torch.equal(batches(guidance_range=(1.5, 6.0)).at(7).guidance, later.guidance)
    assert abs(torch.corrcoef(torch.stack([first.guidance, later.guidance]))[0, 1]) < 0.12
    assert not torch.equal(batches(4, guidance_range=(1.5, 6.0)).at(7).guidance, later.guidance)
    assert torch.equal(first.x0, plain.at(0).x0) and torch.equal(first.labels, plain.at(0).labels)
    assert plain.at(0).guidance is None


MEAN, STD = 0.3, 0.2


class TwoClasses(nn.Module):
    """The exact denoiser of N(-0.3, 0.2^2) and N(0.3, 0.2^2), of label 0 and 1; for no label of both in equal parts."""

    def forward(self, x, sigma, labels):
        variance = expand_like(sigma**2 + STD**2, x)
        of_zero, of_one = (mean + (x - mean) * STD**2 / variance for mean in (-MEAN, MEAN))
        share = torch.sigmoid((2 * MEAN * x / variance).sum((1, 2, 3), keepdim=True))  # of the second class
        labels = expand_like(labels, x)
        return torch.where(labels == 0, of_zero, torch.where(labels == 1, of_one, of_zero + share * (of_one - of_zero)))


@dataclasses.dataclass
class ClassBatches:
    """Endless fresh samples of the two classes, each with a weight of its own."""

    batch_size: int
    device: torch.device = CPU

    def at(self, step):
        generator = torch.Generator().manual_seed(step)
        labels = torch.arange(self.batch_size) % 2
        x0 = (
            STD * torch.randn(self.batch_size, 1, 1, 2, generator=generator)
            + expand_like(2.0 * labels - 1, labels.view(-1, 1, 1, 1)) * MEAN
        )
        return Batch(x0, labels, 1 + 2 * torch.rand(self.batch_size, generator=generator))


def test_a_trained_student_samples_what_its_teacher_does_at_the_weight_asked_for():
    """With two grid points the only step leads from noise to the boundary, where the exact answer is the teacher's."""
    method = CD(num_scales=2, solver="euler", guidance_range=(1.0, 3.0))
    told = {"num_classes": 2, "image_shape": (1, 1, 2), "guidance_range": (1.0, 3.0), "guidance": 1.0}
    spec = ModelSpec(form="skip", network=MLPParams(width=16, depth=1), noise=SHORT, **told)
    student, every = build_seeded(spec, 0), dict.fromkeys(("num_steps", "log_every", "save_every", "grid_every"), 150)
    optimizer = Optimizer(kind="adam", learning_rate=1e-2)
    train = Train(batch_size=64, optimizer=optimizer, emas=(ConstantEma(decay=0.95),), **every)
    state = TrainState(student, train)
    models = Models(student, student, TwoClasses(), distance_of(method, (1, 1, 2)))
    for _ in Trainer(state, method, models, ClassBatches(64), SHORT, 0).run():
        pass
    student.load_state_dict(state.averaged())
    x_t, labels = SHORT.sigma_max * ImageNoise(0, range(200), (1, 1, 2), CPU).draw(), torch.arange(200) % 2
    t, r = (torch.full((200,), sigma) for sigma in (SHORT.sigma_max, SHORT.sigma_min))
    means = {}
    for weight in (1.0, 3.0):
        with torch.no_grad():
            found = student.eval()(x_t, t, labels, guidance=weight)
        exact = STEPS["euler"](partial(guided(TwoClasses(), weight), labels=labels), x_t, t, r)
        assert (found - exact).abs().mean() < 0.1
        means[weight] = found[labels == 1].mean() - found[labels == 0].mean()
    assert means[3.0] > 2 * means[1.0], "a higher weight drives the classes apart"


@pytest.mark.slow
def test_a_step_with_weights_is_counted_as_one_of_a_guided_teacher():
    spec = spec_of(NETWORKS["ddpmpp"], "skip")
    plain = spec.model_copy(update={"guidance_range": None, "guidance": None})
    costs = [
        step_cost(method, of, num_emas=1, bytes_per_value=2).flops_per_image
        for method, of in ((CD(guidance_range=RANGE), spec), (CD(guidance=2.0), plain), (CD(), plain))
    ]
    assert costs[0] == pytest.approx(costs[1], rel=0.01) and costs[0] > 1.2 * costs[2]


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (CD, {"guidance_range": (3, 2)}, r"guidance_range=\[3, 2\] must be two weights, 0 <= low < high"),
        (CD, {"guidance_range": (-1, 2)}, r"guidance_range=\[-1, 2\] must be two weights, 0 <= low < high"),
        (CD, {"guidance_range": (2, 8)}, r"guidance=1 lies outside guidance_range=\[2, 8\]"),
        (SCM, {"guidance_range": (1, 8)}, "kind=scm follows none with these settings; set distil=true"),
        (ECT, {"guidance_range": (1, 8)}, "kind=ect follows none with these settings; .* a solver for ect"),
        (CMInf, {"guidance_range": (1, 8), "distil": False, "distance": "l2"}, "."),
    ],
)
def test_ranges_that_make_no_sense_are_refused(kind, settings, reason):
    with pytest.raises(ValueError, match=reason):
        kind(**settings)


def test_a_model_names_the_weight_it_samples_with():
    for told in ({"guidance": None}, {"guidance_range": None}):
        with pytest.raises(ValueError, match="come together"):
            spec_of(NETWORKS["mlp"], **told)
    with pytest.raises(ValueError, match=r"guidance=5 lies outside guidance_range=\[0\.5, 4\]"):
        spec_of(NETWORKS["mlp"], guidance=5.0)
    assert spec_of(NETWORKS["mlp"]).checked_guidance(4.0) == 4.0
    with pytest.raises(ValueError, match="takes no weight of guidance"):
        spec_of(NETWORKS["mlp"], guidance_range=None, guidance=None).checked_guidance(1.0)
