"""Trainings of a few steps: every method, a network of a few channels, random images."""

import numpy as np
import torch

from cm_core.methods.base import Models
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
from cm_core.model import ModelSpec, build_seeded
from cm_core.networks import EDM2Params, SongUNetParams
from cm_core.noise import Noise
from cm_core.training.batches import Batches
from cm_core.training.config import Train
from cm_core.training.ema import ConstantEma, HalfLifeEma, PowerEma
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from flows.stages.student import build_discriminator
from flows.stages.training import build_weighting

CPU, SHAPE = torch.device("cpu"), (1, 8, 8)
NETWORK = SongUNetParams(channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.2)
CLASSES = 3  # of the images of guided methods
METHODS = {
    "edm": EDM(),
    "cd": CD(),
    "cd-ema": CD(target_decay=0.9),
    "ct": CT(s1=10),
    "ict": ICT(s0=2, s1=8),
    "ect": ECT(),
    "scm": SCM(warmup_steps=4),
    "scm-distil": SCM(distil=True),
    "pd": PD(start_steps=4),  # halvings begin at steps 1 and 3 of 6
    "cm_inf": CMInf(),
    "cm_inf-through": CMInf(stop_gradient=False),
    "meanflow": MeanFlow(),
    "meanflow-predicted": MeanFlow(tangent="predicted"),
    "cd-guided": CD(guidance=3.0),
    "scm-guided": SCM(distil=True, guidance=3.0),
    "cd-weights": CD(guidance=2.0, guidance_range=(1.0, 4.0)),
    "scm-weights": SCM(distil=True, guidance=2.0, guidance_range=(1.0, 4.0)),
    "pd-weights": PD(start_steps=4, guidance=2.0, guidance_range=(1.0, 4.0)),
    "dmd": DMD(student_every=2),
    "dmd-guided": DMD(student_every=3, gan_weight=0, guidance=3.0),
    "dmd-weights": DMD(student_every=2, guidance=2.0, guidance_range=(1.0, 4.0)),
    "sid": DMD(objective="sid", student_every=2, gan_weight=0, generator_sigma=2.5, score_loss="edm", u_max=0.8),
    "cmt": CMT(num_steps=2),
    "cmt-guided": CMT(num_steps=2, solver="heun", guidance=3.0, form="skip"),
    "tcm": TCM(ratio=0.8),
    "edm2": EDM(p_std=1.0),
    "edm2-weighted": EDM(adaptive_weight=True),
    "scm-edm2": SCM(warmup_steps=4, p_std=1.6),
}
EDM2 = EDM2Params(channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), channels_per_head=8, dropout=0.2)
NETWORKS = {  # of methods that do not train NETWORK
    METHODS["edm2"]: EDM2,
    METHODS["edm2-weighted"]: EDM2,
    METHODS["scm-edm2"]: EDM2.model_copy(update={"embedding": "positional", "double_norm": True}),
}


class SpoiledAt(CT):
    """CT with one loss that is not finite at some steps."""

    steps: tuple[int, ...] = (3,)
    value: str = "nan"

    def loss(self, models, batch, context):
        loss = super().loss(models, batch, context)
        spoiled = (torch.arange(len(loss.sigma)) == 2) & (context.step in self.steps)
        return loss._replace(per_sample=loss.per_sample * torch.where(spoiled, float(self.value), 1.0))


# The gradient of one row, of the last rank, overflows fp16 twice, while its loss stays finite.
OVERFLOWING = SpoiledAt(s1=10, steps=(1, 3), value="1e9")
SKIPPED = [0, 1, 1, 2, 2, 2]  # of its six steps so far


def shake(model, seed):
    """Move a new network away from residual branches and an end near zero, where masks and labels hardly matter."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


class Training:
    """A small training of one method, built the same way every time; `place` brings its networks where they train."""

    def __init__(self, method, dropout=NETWORK.dropout, place=lambda model: model, *, shaken=False, **changes):
        self.method, network = method, NETWORKS.get(method, NETWORK).model_copy(update={"dropout": dropout})
        emas = (HalfLifeEma(half_life_images=50), ConstantEma(decay=0.9), PowerEma())
        defaults = {"num_steps": 6, "batch_size": 4, "log_every": 1, "save_every": 1, "grid_every": 1, "emas": emas}
        self.train = Train(**(defaults | changes))
        classes = CLASSES if getattr(method, "guidance", 1) != 1 else 0
        drawn = getattr(method, "guidance_range", None)
        told = {} if drawn is None else {"guidance_range": drawn, "guidance": method.guidance}
        self.spec = ModelSpec(
            form=method.form, network=network, noise=Noise(), image_shape=SHAPE, num_classes=classes, **told
        )
        score_spec, autocast = self.spec.model_copy(update={"form": "denoiser"}), self.train.autocast
        without = {} if method.replaces_teacher else {"guidance_range": None, "guidance": None}
        teacher_spec = score_spec.model_copy(update=without)
        model, target = (build_seeded(self.spec, seed, autocast=autocast) for seed in (0, 1))
        model, target = place(shake(model, 9) if shaken else model), place(target)
        teacher = build_seeded(teacher_spec, 2, autocast=autocast).eval()
        if classes:
            shake(teacher, 3)
        teacher = place(teacher).requires_grad_(False)
        base = place(build_seeded(self.spec, 8, autocast=autocast)).requires_grad_(False) if method.needs_base else None
        score = discriminator = None
        if method.cycle > 1:
            score = place(build_seeded(score_spec, 6, autocast=autocast))
            discriminator = build_discriminator(method, teacher, SHAPE, 7)
        self.state = TrainState(
            model,
            self.train,
            target=target if method.keeps_target else None,
            teacher=teacher if method.replaces_teacher else None,
            weighting=build_weighting(method, 4, CPU),
            score=score,
            discriminator=discriminator,
            cycle=method.cycle,
        )
        distance = method.distance.build(SHAPE) if hasattr(method, "distance") else None
        target = target if method.keeps_target else model
        self.models = Models(model, target, teacher, distance, self.state.weighting, score, discriminator, base)
        pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
        labels = np.arange(len(pixels)) % classes if classes else None
        options = {"batch_size": self.train.batch_size, "flip": True, "guidance_range": drawn}
        self.batches = Batches(pixels, labels, seed=3, device=CPU, **options)

    def steps(self, seed=5, **options):
        return Trainer(self.state, self.method, self.models, self.batches, Noise(), seed).run(**options)

    def tensors(self):
        return {name: tensor.clone() for name, tensor in self.state._tensors().items()}
