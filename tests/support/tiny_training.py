"""Trainings of a few steps: every method, a network of a few channels, random images."""

import numpy as np
import torch

from cm_core.methods.cd import CD
from cm_core.methods.cm_inf import CMInf
from cm_core.methods.ct import CT
from cm_core.methods.ect import ECT
from cm_core.methods.edm import EDM
from cm_core.methods.ict import ICT
from cm_core.methods.pd import PD
from cm_core.methods.scm import SCM
from cm_core.model import ModelSpec, build_seeded
from cm_core.networks import SongUNetParams
from cm_core.noise import Noise
from cm_core.training.batches import Batches
from cm_core.training.config import Train
from cm_core.training.ema import ConstantEma, HalfLifeEma, PowerEma
from cm_core.training.state import TrainState
from cm_core.training.trainer import Trainer
from cm_core.types import Models
from flows.stages.student import build_weighting

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
    "cd-guided": CD(guidance=3.0),
    "scm-guided": SCM(distil=True, guidance=3.0),
}


class Training:
    """A small training of one method, built the same way every time; `place` brings its networks where they train."""

    def __init__(self, method, dropout=NETWORK.dropout, place=lambda model: model, **changes):
        self.method, network = method, NETWORK.model_copy(update={"dropout": dropout})
        emas = (HalfLifeEma(half_life_images=50), ConstantEma(decay=0.9), PowerEma())
        defaults = {"num_steps": 6, "batch_size": 4, "log_every": 1, "save_every": 1, "grid_every": 1, "emas": emas}
        self.train = Train(**(defaults | changes))
        classes = CLASSES if getattr(method, "guidance", 1) != 1 else 0
        self.spec = ModelSpec(form=method.form, network=network, noise=Noise(), image_shape=SHAPE, num_classes=classes)
        teacher_spec, autocast = self.spec.model_copy(update={"form": "denoiser"}), self.train.autocast
        model, target = (place(build_seeded(self.spec, seed, autocast=autocast)) for seed in (0, 1))
        teacher = build_seeded(teacher_spec, 2, autocast=autocast).eval()
        if classes:  # a new network ends near zero and knows no labels
            generator = torch.Generator().manual_seed(3)
            for p in teacher.parameters():
                p.data += 0.1 * torch.randn(p.shape, generator=generator)
        teacher = place(teacher)
        self.state = TrainState(
            model,
            self.train,
            target=target if method.keeps_target else None,
            teacher=teacher if method.replaces_teacher else None,
            weighting=build_weighting(method, 4, CPU),
        )
        distance = method.distance.build(SHAPE) if hasattr(method, "distance") else None
        self.models = Models(model, target if method.keeps_target else model, teacher, distance, self.state.weighting)
        pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
        labels = np.arange(len(pixels)) % classes if classes else None
        self.batches = Batches(pixels, labels, batch_size=self.train.batch_size, seed=3, device=CPU, flip=True)

    def steps(self, **options):
        return Trainer(self.state, self.method, self.models, self.batches, Noise(), 5).run(**options)

    def tensors(self):
        return {name: tensor.clone() for name, tensor in self.state._tensors().items()}


NETWORK = SongUNetParams(channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(), dropout=0.2)
CLASSES = 3  # of the images of guided methods
