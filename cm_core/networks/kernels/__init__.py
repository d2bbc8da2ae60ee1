"""The Triton kernels of the networks, one file per operation; layers import them for tensors on a GPU.

All read and write channels last, compute in float32 for any dtype, and have the formulas' gradients, so that only
rounding differs from PyTorch's own functions.
"""

from cm_core.networks.kernels.magnitude import mp_fork, mp_modulated_silu, mp_sum, unit_rows
from cm_core.networks.kernels.norm import norm_act, norm_act_forward_mode
from cm_core.networks.kernels.resample import downsample, upsample
from cm_core.networks.kernels.residual import project_residual_add, projects, residual_add
from cm_core.networks.kernels.weights import force_unit_rms, unit_weight

__all__ = [
    "downsample",
    "force_unit_rms",
    "mp_fork",
    "mp_modulated_silu",
    "mp_sum",
    "norm_act",
    "norm_act_forward_mode",
    "project_residual_add",
    "projects",
    "residual_add",
    "unit_rows",
    "unit_weight",
    "upsample",
]
