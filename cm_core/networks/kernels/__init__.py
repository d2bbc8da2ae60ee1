"""The Triton kernels of the networks, a file an operation; layers import them where a tensor is on a GPU.

All read and write channels last, compute in float32 whatever the tensors hold, and have the gradients of the formulas,
so that only rounding differs from PyTorch's own functions.
"""

from cm_core.networks.kernels.norm import norm_act
from cm_core.networks.kernels.resample import downsample, upsample
from cm_core.networks.kernels.residual import project_residual_add, projects, residual_add

__all__ = ["downsample", "norm_act", "project_residual_add", "projects", "residual_add", "upsample"]
