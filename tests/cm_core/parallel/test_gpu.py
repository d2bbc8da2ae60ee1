"""Tests that need a GPU: kernels, graphs and masks. Skipped where there is none; a minute where there is one."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cm_core.methods.base import Batch, Models, StepContext
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
from cm_core.model import ModelSpec
from cm_core.networks import modes
from cm_core.networks.dropout import seed_dropout
from cm_core.networks.modes import plain_layers
from cm_core.noise import Noise
from cm_core.parallel import gradients, graphs, ranks
from cm_core.parallel.graphs import with_cuda_graphs
from cm_core.philox import normals
from cm_core.randomness import derive_seed
from cm_core.sampling import ImageNoise
from cm_core.training.batches import Batches
from cm_core.training.config import Train
from cm_core.training.passes import compose_passes
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from flows.stages.models import to_device
from flows.stages.student import build_discriminator
from flows.stages.training import build_weighting
from small_networks import relative, small_networks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA, SHAPE, BATCH = torch.device("cuda"), (3, 32, 32), 32
NETWORKS = small_networks(channels=32, attend_at=16)


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32, which would hide differences."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def build(network, *, form="unshifted", dropout=0.0, autocast=None, noise=None):
    """A model whose residual branches are not near zero, as they are at the start, so that everything shows."""
    noise = noise or Noise()
    params = network.model_copy(update={"dropout": dropout})
    spec = ModelSpec(form=form, network=params, noise=noise, image_shape=SHAPE)
    model = spec.build(autocast=autocast)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator) + (p if p.ndim == 1 else 0))
    return to_device(model, CUDA)


def inputs():
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(BATCH, *SHAPE, generator=generator).to(CUDA)
    return x0, torch.logspace(-2, 1.8, BATCH).to(CUDA)


def pass_through(model, seed=3):
    x, sigma = inputs()
    model.zero_grad()
    seed_dropout(seed, CUDA)
    out = model(x, sigma)
    out.square().mean().backward()
    return [out.detach().clone(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("autocast", "tolerance"), [(None, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_kernels_compute_what_the_plain_network_computes(name, autocast, tolerance):
    model = build(NETWORKS[name], dropout=0.0)
    with plain_layers():
        expected = pass_through(model)
    model.autocast = autocast
    found = pass_through(model)
    assert relative(found[:1], expected[:1]) < tolerance
    assert relative(found[1:], expected[1:]) < tolerance


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_passes_with_and_without_gradients_recorded_or_not_drop_the_same(autocast):
    model = build(NETWORKS["ddpmpp"], dropout=0.5, autocast=autocast).train()
    x, sigma = inputs()
    first = None
    for replayed in (False, True):
        if replayed:
            model.network_pass = with_cuda_graphs(model.net)
        for _ in range(3):  # once plainly, once recording, once replaying
            seed_dropout(3, CUDA)
            trained = model(x, sigma).detach()
            with torch.no_grad():
                target = model(x, sigma)
            first = trained if first is None else first
            torch.testing.assert_close(trained, first, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(target, first, rtol=1e-2, atol=1e-2)
    seed_dropout(4, CUDA)
    assert (model(x, sigma) - first).abs().max() > 0.1


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["ddpmpp", "edm2"])  # EDM2's weights have no copies in half precision
def test_recorded_gradients_are_those_of_a_plain_pass_in_one_piece_or_many(name, processes, autocast, monkeypatch):
    model, sent = build(NETWORKS[name], autocast=autocast), []
    expected = pass_through(model)
    monkeypatch.setattr(ranks, "world_size", lambda: processes)  # this one alone is here: a sum is what it sends
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 100_000)
    monkeypatch.setattr(graphs, "exchanges", lambda: nullcontext(sent.append))
    model.network_pass = with_cuda_graphs(model.net)
    pass_through(model)
    for _ in range(2):
        sent.clear()
        found = pass_through(model)  # with the memory that the graphs write poisoned by what came before
        assert len(sent) == 0 if processes == 1 else len(sent) > 2
        assert relative(found, expected) < (1e-5 if autocast is None else 1e-2)
        for p in model.parameters():
            p.grad.fill_(float("nan"))
    if processes == 2:
        assert sum(piece.numel() for piece in sent) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_derivative_sees_the_mask_of_the_pass_that_is_trained(autocast):
    """sCM's forward-mode pass runs the plain layers, its trained pass the kernels: the same activations must go."""
    model = build(NETWORKS["ddpmpp"], dropout=0.5, autocast=autocast, noise=Noise(c_noise="angle")).train()
    x0, sigma = inputs()
    context = StepContext(0, 1, Noise(), torch.Generator(CUDA).manual_seed(0))
    seed_dropout(5, CUDA)
    with torch.no_grad():
        x_in, f_minus, g = SCM().tangent_at(Models(model, model), Batch(x0, None), context, sigma, 1.0)
    f = -model.raw(x_in, sigma)
    assert g.isfinite().all()
    assert relative([f.detach()], [f_minus]) < (1e-4 if autocast is None else 3e-2)


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_derivative_by_the_kernels_of_norms_is_that_of_pytorchs_layers(name, autocast, monkeypatch):
    model, found = build(NETWORKS[name], autocast=autocast), []
    x, sigma = inputs()
    along = torch.randn_like(x), torch.rand_like(sigma)
    for fuses in (modes.fuses_forward_mode, lambda x: False):
        monkeypatch.setattr(modes, "fuses_forward_mode", fuses)
        with torch.no_grad():
            found.append(modes.derivative(model, (x, sigma), along))
    assert relative(*found) < (1e-5 if autocast is None else 1e-2)


METHODS = {  # and the network, where it is not ddpmpp
    "edm": EDM(),
    "cd": CD(target_decay=0.9),
    "ct": CT(),
    "ict": ICT(),
    "ect": ECT(),
    "scm": SCM(),
    "scd": SCM(distil=True),
    "scm-edm2_scm": SCM(p_std=1.6),
    "pd": PD(start_steps=4),
    "cm_inf": CMInf(),
    "dmd": DMD(student_every=2),
    "sid": DMD(objective="sid", student_every=2, gan_weight=0),
    "meanflow": MeanFlow(),
    "imf": MeanFlow(tangent="predicted"),
    "cmt": CMT(),
    "tcm": TCM(ratio=0.9),  # at the paper's 0.999 rounding is much of the difference, weighted by a thousand
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_composed_passes_as_with_plain_ones(name, monkeypatch):
    """In the precision of training: of teachers bf16, of students fp16 (docs/adr/0013)."""
    network, replay, replayed = name.partition("-")[2] or "ddpmpp", graphs._BackwardPass.replay, []
    monkeypatch.setattr(graphs._BackwardPass, "replay", lambda self: replayed.append(self) or replay(self))
    plain, composed = (
        [
            entry.get("loss", entry.get("critic_loss"))
            for entry in take_steps(METHODS[name], composed, network, precision="bf16" if name == "edm" else "fp16")
        ]
        for composed in (False, True)
    )
    assert composed == pytest.approx(plain, rel=0.05)
    assert replayed


class SpoiledECT(ECT):
    """ECT with a loss of nan in steps 2 and 4."""

    def loss(self, models, batch, context):
        loss = super().loss(models, batch, context)
        return loss._replace(per_sample=loss.per_sample * (float("nan") if context.step in (2, 4) else 1.0))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_whose_loss_is_not_finite_are_skipped_with_composed_passes(precision):
    settings = {"on_nonfinite": "skip", "precision": precision}
    for composed in (False, True):
        entries = take_steps(SpoiledECT(), composed, **settings)
        assert [entry["nonfinite_steps"] for entry in entries] == [0, 0, 1, 1, 2, 2]
        assert ["loss" in entry for entry in entries] == [True, True, False, True, False, True]
        assert all(np.isfinite(value) for entry in entries for value in entry.values())


def take_steps(method, composed, network="ddpmpp", **settings):
    """Return the metrics of six steps of a small network with dropout, by a training's composed passes or plainly."""
    every = {"log_every": 1, "save_every": 6, "grid_every": 6}
    train = Train(**{"num_steps": 6, "batch_size": 16, **every, **settings})
    noise = Noise(c_noise="angle" if method.kind == "scm" else "log_sigma")
    common = {"autocast": train.autocast, "noise": noise}
    model = build(NETWORKS[network], form=method.form, dropout=0.2, **common)
    teacher = build(NETWORKS[network], form="denoiser", **common).eval().requires_grad_(False)
    target = copy.deepcopy(model) if method.keeps_target else None
    base = copy.deepcopy(model).requires_grad_(False) if method.needs_base else None
    weighting, score, discriminator = build_weighting(method, 0, CUDA), None, None
    if method.cycle > 1:
        score = build(NETWORKS[network], form="denoiser", dropout=0.2, **common)
        discriminator = build_discriminator(method, teacher, SHAPE, 0)
    state = TrainState(
        model,
        train,
        target=target,
        teacher=teacher if method.replaces_teacher else None,
        weighting=weighting,
        score=score,
        discriminator=discriminator,
        cycle=method.cycle,
    )
    distance = method.distance.build(SHAPE) if hasattr(method, "distance") else None
    models = Models(model, target or model, teacher, distance, weighting, score, discriminator, base)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    batches = Batches(pixels, None, batch_size=train.batch_size, seed=0, device=CUDA)
    trainer = Trainer(state, method, models, batches, noise, 0)
    if composed:
        trainer.models = compose_passes(models, method, train, graphs=True)
    return list(trainer.run())


def test_the_network_agrees_with_the_cpu():
    model = build(NETWORKS["ddpmpp"])
    x, sigma = inputs()
    with torch.no_grad():
        found, expected = model(x, sigma).cpu(), copy.deepcopy(model).cpu()(x.cpu(), sigma.cpu())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_noise_of_an_image_is_the_same_on_every_device():
    indices = range(2**32 - 20, 2**32 + 20)
    a, b = (ImageNoise(7, indices, SHAPE, torch.device(device)) for device in ("cpu", "cuda"))
    for draw in range(2):
        noise = b.draw()
        plainly = normals(torch.tensor(indices, device=CUDA), draw, noise[0].numel(), derive_seed(7, "image"))
        assert torch.equal(noise.flatten(1), plainly)  # the kernel's are PyTorch's to the bit
        torch.testing.assert_close(a.draw(), noise.cpu(), rtol=1e-6, atol=1e-6)
