"""Every method, and batches and networks on which its loss is known."""

import pytest
import torch

from cm_core.distances import Pixelwise, PseudoHuber
from cm_core.methods.base import Batch, Models, StepContext
from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf
from cm_core.methods.cmt import CMT
from cm_core.methods.ct import CT
from cm_core.methods.dmd import DMD
from cm_core.methods.ect import ECT
from cm_core.methods.ict import ICT
from cm_core.methods.meanflow import MeanFlow
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.methods.tcm import TCM
from cm_core.model import ModelSpec, build_seeded
from cm_core.networks import MLPParams
from cm_core.noise import Noise
from oracles import GaussianConsistency, GaussianDenoiser

NOISE, CPU = Noise(), torch.device("cpu")


STUDENT_METHODS = {
    "cd": CD(),
    "cd-ema": CD(target_decay=0.9),
    "ct": CT(s1=20),
    "ict": ICT(s1=80),
    "ect": ECT(),
    "ect-const-edm": ECT(mapping="const", weighting="edm"),
    "ect-distil": ECT(solver="heun"),
    "pd": PD(start_steps=8),
    "scm": SCM(),
    "scm-distil": SCM(distil=True, tangent="clip"),
    "cm_inf": CMInf(),
    "cm_inf-isolated": CMInf(distil=False, distance=PseudoHuber()),
    "cm_inf-through": CMInf(stop_gradient=False, distance=Pixelwise(kind="l1")),
    "meanflow": MeanFlow(),
    "meanflow-predicted": MeanFlow(tangent="predicted"),
    "dmd": DMD(gan_weight=0),
    "sid": DMD(objective="sid", gan_weight=0, generator_sigma=2.5),
    "cmt": CMT(num_steps=8),
    "cmt-heun": CMT(num_steps=4, solver="heun", form="skip"),
    "tcm": TCM(),
    "tcm-gap": TCM(ratio=0.5, distance=Pixelwise()),
}


every_method = pytest.mark.parametrize("method", STUDENT_METHODS.values(), ids=STUDENT_METHODS)


def context(step=0, num_steps=100, noise=NOISE, seed=0):
    return StepContext(step, num_steps, noise, torch.Generator().manual_seed(seed))


def gaussian_batch(size=4096, shape=(1, 2, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return Batch(0.5 * torch.randn(size, *shape, generator=generator, dtype=dtype), None)


def oracle_models(method):
    exact = GaussianConsistency(NOISE)
    return Models(exact, exact, GaussianDenoiser(), method.distance.build((1, 2, 2)), base=exact)


def distance_of(method, shape=(1, 2, 2)):
    return method.distance.build(shape) if hasattr(method, "distance") else None


def precond(seed, form):
    spec = ModelSpec(form=form, network=MLPParams(width=16, depth=1), noise=NOISE, image_shape=(1, 2, 2))
    model = build_seeded(spec, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def spec_of(method, noise=None):
    return ModelSpec(
        form=method.form, network=MLPParams(width=32, depth=1), noise=noise or SHORT, image_shape=(1, 1, 2)
    )


def shake(model):
    """Give a fresh network, whose last layers are zero, a function of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


SHORT = Noise(sigma_min=0.05, sigma_max=5.0)  # few scales carry the boundary to the top within seconds
