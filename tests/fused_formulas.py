"""What cm_core.networks.kernels computes, by PyTorch's own functions: lets tests run the fused layers on the CPU."""

import torch.nn.functional as F

from cm_core.tensors import expand_like


def norm_act(x, *, groups, eps, scale, shift, silu, before=None):
    h = x if before is None else x + expand_like(before, x)
    h = F.group_norm(h, groups, eps=eps)
    per_image = scale.ndim == 2
    scale, shift = (expand_like(v, x) if per_image else v[:, None, None] for v in (scale, shift))
    h = h * scale + shift
    return F.silu(h) if silu else h


def join(x, h, bias, factor):
    return (x + h + bias[:, None, None]) * factor


def halve(x, factor):
    return 4 * factor * F.avg_pool2d(x, 2)


def double(x, factor):
    return factor * F.interpolate(x, scale_factor=2.0, mode="nearest")
