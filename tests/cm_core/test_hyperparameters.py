"""Hyperparameters: defaults are the papers', and bounds exclude what the formulas do not define and nothing else."""

import pytest
from pydantic import ValidationError

from cm_core.distances import Lpips, Pixelwise, PseudoHuber
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
from cm_core.metrics.evaluation import MetricParams
from cm_core.noise import Noise
from cm_core.sampling import TeacherSampler
from cm_core.training.ema import ConstantEma, HalfLifeEma, PowerEma

DEFAULTS = {
    Noise: {"sigma_min": 0.002, "sigma_max": 80, "rho": 7, "sigma_data": 0.5, "c_noise": "log_sigma"},
    Pixelwise: {"kind": "l2"},
    PseudoHuber: {"kind": "pseudo_huber", "c_per_sqrt_dim": 0.00054},
    Lpips: {"kind": "lpips", "pooling": "max", "resize_below": 256, "weights": None, "sha256": None},
    ConstantEma: {"kind": "constant", "decay": 0.9999},
    HalfLifeEma: {"kind": "half_life", "half_life_images": 500_000, "ramp": 0.05},
    PowerEma: {"kind": "power", "width": 0.05},
    TeacherSampler: {
        **{"solver": "heun", "num_steps": 18, "s_churn": 0, "s_min": 0, "s_max": 1e9, "s_noise": 1},
        **{"guidance": 1, "guidance_interval": None},
    },
    MetricParams: {
        **{"beside_fid": ("is", "kid", "precision_recall"), "isc_splits": 10, "isc_min_images": 500},
        **{"kid_subsets": 100, "kid_subset_size": 1000, "prc_neighbourhood": 3, "prc_images": 10_000},
    },
    EDM: {"kind": "edm", "p_mean": -1.2, "p_std": 1.2, "label_dropout": 0, "adaptive_weight": False, "augment": None},
    CD: {
        **{"kind": "cd", "num_scales": 18, "solver": "heun", "guidance": 1, "distance": Pixelwise(), "target_decay": 0},
        **{"form": "skip", "guidance_range": None},
    },
    CT: {
        **{"kind": "ct", "s0": 2, "s1": 150, "mu0": 0.9, "num_scales": None, "target_decay": None},
        **{"mu_per_interval": True, "distance": Pixelwise(), "form": "skip"},
    },
    ICT: {
        **{"kind": "ict", "s0": 10, "s1": 1280, "p_mean": -1.1, "p_std": 2, "distance": PseudoHuber()},
        "form": "skip",
    },
    ECT: {
        **{"kind": "ect", "p_mean": -1.1, "p_std": 2, "q": 2, "num_stages": 8, "mapping": "sigmoid", "k": 8, "b": 1},
        **{"weighting": "inverse_gap", "distance": PseudoHuber(c_per_sqrt_dim=1e-8), "solver": None, "guidance": 1},
        "guidance_range": None,
    },
    PD: {
        **{"kind": "pd", "start_steps": 4096, "end_steps": 1, "distance": Pixelwise(), "guidance": 1, "anneal": True},
        "guidance_range": None,
    },
    SCM: {
        **{"kind": "scm", "distil": False, "guidance": 1, "p_mean": -1, "p_std": 1.4, "warmup_steps": 10_000},
        **{"tangent": "normalise", "tangent_c": 0.1, "adaptive_weight": True, "guidance_range": None},
    },
    MeanFlow: {
        **{"kind": "meanflow", "t_mean": -0.6, "t_std": 1.6, "r_mean": -4.0, "r_std": 1.6, "instant_share": 0.25},
        **{"tangent": "sampled", "power": 0.75, "power_c": 1e-3, "augment": None},
    },
    CMInf: {
        **{
            "kind": "cm_inf",
            "distil": True,
            "guidance": 1,
            "guidance_range": None,
            "stop_gradient": True,
            "distance": Pixelwise(),
            "form": "skip",
        },
    },
    DMD: {
        **{"kind": "dmd", "objective": "vsd", "alpha": 1.2, "generator_sigma": None, "student_every": 5, "guidance": 1},
        **{"u_min": 0.02, "u_max": 0.98, "score_loss": "plain", "gan_weight": 1e-3, "guidance_range": None},
    },
    CMT: {
        **{"kind": "cmt", "num_steps": 16, "solver": "dpmpp", "guidance": 1, "distance": Pixelwise()},
        "form": "unshifted",
    },
    TCM: {
        **{"kind": "tcm", "split": 1, "loc": 0, "scale": 0.2, "freedom": 0.01, "ratio": 0.999, "k": 8},
        **{
            "boundary_share": 0.25,
            "boundary_weight": 0.1,
            "distance": PseudoHuber(c_per_sqrt_dim=1e-8),
            "form": "unshifted",
        },
    },
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_the_papers(kind):
    found = kind.model_validate({})
    assert {name: getattr(found, name) for name in kind.model_fields} == DEFAULTS[kind]


BOUNDS = [  # class, field, the smallest or largest values allowed, the nearest refused
    (Noise, "sigma_min", [1e-9], [0]),
    (Noise, "sigma_max", [0.0021], [0, 0.002]),
    (Noise, "rho", [1e-9], [0]),
    (Noise, "sigma_data", [1e-9], [0]),
    (PseudoHuber, "c_per_sqrt_dim", [0], [-1e-9]),
    (Lpips, "resize_below", [32], [31]),
    (Lpips, "sha256", ["0" * 64], ["0" * 63, "0" * 65, "g" * 64]),
    (ConstantEma, "decay", [0, 0.999999], [-1e-9, 1]),
    (HalfLifeEma, "half_life_images", [1e-9], [0]),
    (HalfLifeEma, "ramp", [None, 1e-9], [0]),
    (PowerEma, "width", [1e-3, 0.288], [0, 0.289]),
    (TeacherSampler, "num_steps", [2], [1]),
    (TeacherSampler, "s_churn", [0], [-1e-9]),
    (TeacherSampler, "s_min", [0], [-1e-9]),
    (TeacherSampler, "s_max", [1e-9], [0]),
    (TeacherSampler, "s_noise", [1e-9], [0]),
    (MetricParams, "isc_splits", [1], [0]),
    (MetricParams, "isc_min_images", [1], [0]),
    (MetricParams, "kid_subsets", [1], [0]),
    (MetricParams, "kid_subset_size", [2], [1]),
    (MetricParams, "prc_neighbourhood", [1], [0]),
    (MetricParams, "prc_images", [4, 50_000], [3, 50_001]),
    (EDM, "p_std", [1e-9], [0]),
    (EDM, "label_dropout", [0, 1], [-1e-9, 1 + 1e-9]),
    (CD, "num_scales", [2], [1]),
    (CD, "target_decay", [0, 0.999999], [-1e-9, 1]),
    (CT, "s0", [2, 150], [1, 151]),
    (CT, "s1", [2], [1]),
    (CT, "mu0", [1e-9, 0.999999], [0, 1]),
    (CT, "num_scales", [None, 2], [1]),
    (CT, "target_decay", [None, 0, 0.999999], [-1e-9, 1]),
    (ICT, "s0", [1, 1280], [0, 1281]),
    (ICT, "s1", [10], [9]),
    (ICT, "p_std", [1e-9], [0]),
    (ECT, "p_std", [1e-9], [0]),
    (ECT, "q", [1.0001], [1]),
    (ECT, "num_stages", [1], [0]),
    (ECT, "k", [0], [-1e-9]),
    (ECT, "b", [1e-9], [0]),
    (PD, "start_steps", [1, 2, 8192], [0, 3, 6, 12]),
    (PD, "end_steps", [1, 2, 4096], [0, 3, 8192]),
    (SCM, "p_std", [1e-9], [0]),
    (SCM, "warmup_steps", [0], [-1]),
    (SCM, "tangent_c", [1e-9], [0]),
    *((MeanFlow, field, [1e-9], [0]) for field in ("t_std", "r_std", "power_c")),
    (MeanFlow, "instant_share", [0, 0.999999], [-1e-9, 1]),
    (MeanFlow, "power", [0], [-1e-9]),
    (DMD, "generator_sigma", [None, 1e-9], [0]),
    (DMD, "student_every", [2], [1]),
    (DMD, "u_min", [0, 0.97], [-1e-9, 0.98]),
    (DMD, "u_max", [0.03, 1], [0.02, 1.0001]),
    (DMD, "gan_weight", [0], [-1e-9]),
    (CMT, "num_steps", [2], [1]),
    *((TCM, field, [1e-9], [0]) for field in ("split", "scale", "freedom", "boundary_weight")),
    (TCM, "ratio", [1e-9, 0.999999], [0, 1]),
    (TCM, "boundary_share", [0, 0.999999], [-1e-9, 1]),
    (TCM, "k", [0], [-1e-9]),
    *((kind, "guidance", [0], [-1e-9]) for kind in (TeacherSampler, CD, ECT, PD, SCM, CMInf, DMD, CMT)),
]


@pytest.mark.parametrize(("kind", "field", "allowed", "refused"), BOUNDS)
def test_bounds_of_hyperparameters(kind, field, allowed, refused):
    for value in allowed:
        assert getattr(kind(**{field: value}), field) == value
    for value in refused:
        with pytest.raises(ValidationError):
            kind(**{field: value})


def test_pd_may_end_at_several_steps():
    assert PD(start_steps=48, end_steps=3).end_steps == 3
    with pytest.raises(ValidationError, match="start_steps=2 must be end_steps=4 times a power of two, such as 256"):
        PD(start_steps=2, end_steps=4)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_unknown_and_changed_hyperparameters_are_refused(kind):
    with pytest.raises(ValidationError):
        kind(unknown=1)
    with pytest.raises(ValidationError):
        setattr(kind(), next(iter(DEFAULTS[kind])), None)
