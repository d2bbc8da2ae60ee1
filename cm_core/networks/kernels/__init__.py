"""The Triton kernels of the networks, one file per operation; layers import them for tensors on a GPU.

All read and write channels last, compute in float32 for any dtype, and have the formulas' gradients, so that only
rounding differs from PyTorch's own functions.
"""

from cm_core.networks.kernels.norm import norm_act, norm_act_forward_mode
from cm_core.networks.kernels.resample import downsample, upsample
from cm_core.networks.kernels.residual import project_residual_add, projects, residual_add

__all__ = [
    "downsample",
    "norm_act",
    "norm_act_forward_mode",
    "project_residual_add",
    "projects",
    "residual_add",
    "upsample",
]
