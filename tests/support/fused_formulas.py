"""The functions of cm_core.networks.kernels by PyTorch's own functions: lets tests run the fused layers on the CPU."""

import math

import torch
import torch.nn.functional as F

from cm_core.tensors import expand_like


def norm_act(x, *, groups, eps, scale, shift, silu, bias=None, before=None, beside=None):
    h = x if beside is None else torch.cat([x, beside], dim=1)
    h = h if bias is None else h + bias[:, None, None]
    h = h if before is None else h + expand_like(before, x)
    h = F.group_norm(h, groups, eps=eps)
    per_image = scale.ndim == 2
    scale, shift = (expand_like(v, x) if per_image else v[:, None, None] for v in (scale, shift))
    h = h * scale + shift
    return F.silu(h) if silu else h, x, beside


def projects(x, beside):
    return True


def project_residual_add(x, beside, weight, h, bias, factor):
    return residual_add(F.conv2d(torch.cat([x, beside], dim=1), weight[:, :, None, None]), h, bias, factor)


def residual_add(x, h, bias, factor):
    return (x + h + bias[:, None, None]) * factor


def downsample(x, factor):
    return 4 * factor * F.avg_pool2d(x, 2)


def upsample(x, factor):
    return factor * F.interpolate(x, scale_factor=2.0, mode="nearest")


def unit_weight(weight, gain, dtype):
    rows = weight.flatten(1)
    rows = rows / (rows.square().sum(1, keepdim=True).sqrt() + 1e-4 * math.sqrt(rows.shape[1]))
    return (rows if gain is None else rows * gain).view(weight.shape).to(dtype)


def unit_rows(x):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-4)


def mp_fork(x, beside, *, normalised):
    if beside is not None:
        width = x.shape[1] + beside.shape[1]
        parts = [t * math.sqrt(width / 2 / t.shape[1]) for t in (x, beside)]
        x = torch.cat(parts, dim=1)
    x = unit_rows(x.movedim(1, -1)).movedim(-1, 1) if normalised else x
    return x, F.silu(x) / 0.596


def mp_modulated_silu(h, factor):
    return F.silu(h * expand_like(factor, h)) / 0.596


def mp_sum(a, b, share, limit):
    return (((1 - share) * a + share * b) / math.hypot(1 - share, share)).clamp(-limit, limit)
