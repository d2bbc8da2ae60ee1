"""Run the Triton kernels on the CPU, by Triton's interpreter, and print how far they are from PyTorch's own functions.

A process of its own: `TRITON_INTERPRET=1` must be set before Triton is imported.
"""

import json
import math
import types

import torch

import fused_formulas
from cm_core.model import ModelSpec
from cm_core.networks import dropout, kernels, modes
from cm_core.networks.blocks import ResidualBlock
from cm_core.networks.kernels import norm_device, residual
from cm_core.networks.kernels.dropout import masked
from cm_core.noise import Noise
from small_networks import relative, small_networks

# channels of x, channels beside, groups, height, width
NORMS = {
    "one pixel": (16, 0, 1, 1, 1),
    "whole images": (32, 0, 8, 8, 8),
    "odd sizes": (24, 0, 3, 5, 7),
    "steps over a large image": (8, 0, 2, 96, 64),
    "two parts, each of whole programs": (64, 32, 24, 4, 4),
    "two parts that a program mixes": (20, 8, 7, 4, 3),
    "two parts of a large image": (12, 4, 2, 64, 96),
}


def draw(*shape):
    """Return numbers far enough from zero mean and unit variance that nothing cancels."""
    x = 1.5 * torch.randn(shape) + 0.5
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def errors(name, tensors, **options):
    """Return the errors of a function's outputs and of their gradients, whatever part of the outputs is used."""
    results = []
    for functions in (kernels, fused_formulas):
        leaves = {key: t.clone(memory_format=torch.preserve_format).requires_grad_() for key, t in tensors.items()}
        outputs = getattr(functions, name)(**leaves, **options)
        outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out is not None]
        results.append([])
        for used in (outputs, outputs[:1], outputs[:2]):
            generator = torch.Generator().manual_seed(1)
            total = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in used)
            gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=True)
            results[-1] += [*(out.detach() for out in used), *gradients]
    return relative(*results)


def norm_errors():
    """Yield the errors of norms of all shapes, with everything that may be added and without."""
    for shape, (first, second, groups, height, width) in NORMS.items():
        channels, tensors = first + second, {"x": draw(2, first, height, width)}
        if second:
            tensors["beside"] = draw(2, second, height, width)
        affine = {"scale": draw(channels), "shift": draw(channels)}
        of_images = {"scale": draw(2, channels), "shift": draw(2, channels)}
        added = {"bias": draw(channels), "before": draw(2, channels)}
        for what, more, silu in (
            ("alone", affine, False),
            ("with all added", affine | added, True),
            ("scaled by image", of_images | {"bias": added["bias"]}, True),
        ):
            yield f"norm: {shape}, {what}", errors("norm_act", tensors | more, groups=groups, eps=1e-5, silu=silu)


def norm_derivative_error(shape, silu):
    """Return the error of a norm and its derivative in forward mode."""
    first, _, groups, height, width = NORMS[shape]
    options = {"scale": draw(first), "shift": draw(first), "groups": groups, "eps": 1e-5, "silu": silu}
    along = (draw(2, first, height, width),), (draw(2, first, height, width),)
    plainly = ((t.contiguous(),) for (t,) in along)  # PyTorch's derivative of its group norm wants channels first
    expected = modes.derivative(lambda x: fused_formulas.norm_act(x, **options)[0], *plainly)
    with torch.no_grad():
        return relative(modes.derivative(lambda x: kernels.norm_act_forward_mode(x, **options), *along), expected)


def shaken(params):
    """Return a model whose residual branches, which begin near zero, show errors; images and noise levels."""
    model = ModelSpec(form="skip", network=params, noise=Noise(), image_shape=(3, 8, 8)).build()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape) + (p if p.ndim == 1 else 0))
    return model, draw(4, 3, 8, 8), torch.tensor([0.01, 0.5, 3.0, 60.0])


def network_derivative_error(params):
    """Return the error of a network's output and derivative in forward mode: the norms' kernels against formulas."""
    model, x, sigma = shaken(params)
    tangents, pairs, fuses = (draw(4, 3, 8, 8), torch.rand(4)), [], modes.fuses_forward_mode
    for chosen in (fuses, lambda x: False):
        modes.fuses_forward_mode = chosen
        with torch.no_grad():
            pairs.append(modes.derivative(model, (x, sigma), tangents))
    modes.fuses_forward_mode = fuses
    assert not any(out.requires_grad for out in pairs[0])
    return relative(*pairs)


def network_error(params, *, checkpointed=False):
    """Return the error of a network's output and gradients: fused layers against plain ones, never recomputed."""
    model, x, sigma = shaken(params)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.checkpointed = checkpointed

    def run():
        model.zero_grad()
        out = model(x, sigma)
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    with modes.plain_layers():
        expected = run()
    found = run()
    return max(relative(found[:1], expected[:1]), relative(found[1:], expected[1:]))


def dropout_error(shape, layer, first):
    """Return the error of the kernel's masked tensor against the formula's: 0, to the bit."""
    h, seed, kept = draw(*shape), torch.tensor(2**41 + 3), 40_000
    keep = dropout.keep_mask(h, seed, kept, layer, first)
    expected = torch.where(keep, h * (dropout.LEVELS / kept), 0.0)
    return relative([masked(h, seed, kept, layer, first)], [expected])


def dropout_derivative_error():
    """Return the error of the derivatives of the kernel."""
    dropout._masked = lambda h, kept, layer, first: masked(h, dropout.seed_on(h.device), kept, layer, first)
    h, tangent = draw(2, 8, 4, 4), draw(2, 8, 4, 4)
    mask = dropout.dropout(torch.ones_like(h), 0.3, layer=1)
    out, d_out = modes.derivative(lambda h: dropout.dropout(h, 0.3, layer=1), (h,), (tangent,))
    (gradient,) = torch.func.vjp(lambda h: dropout.dropout(h, 0.3, layer=1), h)[1](tangent)
    return relative([out, d_out, gradient], [h * mask, tangent * mask, tangent * mask])


def forced_error():
    """Return the error of weights forced to unit length in place."""
    weight, none = draw(24, 70, 3, 3), torch.empty(0, 4)
    expected = [math.sqrt(weight[0].numel()) * fused_formulas.unit_weight(weight, None, torch.float32), none]
    for found in (weight, none):
        kernels.force_unit_rms(found)
    return relative([weight, none], expected)


def magnitude_errors():
    """Yield the errors of what EDM2's network alone uses."""
    for size, weight in {"conv": draw(24, 16, 3, 3), "long": draw(3, 500, 3, 3), "linear": draw(16, 24)}.items():
        for what, gain in (("alone", {}), ("with gain", {"gain": draw(1)})):
            options = {"dtype": torch.float32} | ({} if gain else {"gain": None})
            yield f"unit_weight: {size}, {what}", errors("unit_weight", {"weight": weight} | gain, **options)
    yield "force_unit_rms", forced_error()
    for channels, others in ((16, 8), (24, 0), (1500, 0), (1030, 70)):
        one = {"x": draw(2, channels, 5, 3)}
        both = one | {"beside": draw(2, others, 5, 3)} if others else one
        options = {} if others else {"beside": None}
        yield f"mp_fork: {channels} beside {others}", errors("mp_fork", both, **options, normalised=False)
        yield f"mp_fork: {channels}, normalised", errors("mp_fork", one, beside=None, normalised=True)
    yield "unit_rows", errors("unit_rows", {"x": draw(2, 5, 3, 2, 20)})
    for sizes in ((2, 16, 5, 3), (2, 150, 24, 20), (3, 8, 1, 1)):
        modulation = {"h": draw(*sizes), "factor": draw(*sizes[:2])}
        yield f"mp_modulated_silu: {sizes}", errors("mp_modulated_silu", modulation)
        for limit in (math.inf, 0.8):
            summands = {"a": draw(*sizes), "b": draw(*sizes)}
            yield f"mp_sum: {sizes}, within {limit}", errors("mp_sum", summands, share=0.3, limit=limit)


def all_errors():
    """Return every error by name."""
    x, h, bias = draw(2, 16, 6, 4), draw(2, 16, 6, 4), draw(16)
    wide = draw(2, 24, 6, 4)
    found = dict(norm_errors()) | dict(magnitude_errors())
    for factor in (1.0, 0.7):
        found[f"residual_add times {factor}"] = errors("residual_add", {"x": x, "h": h, "bias": bias}, factor=factor)
        found[f"downsample times {factor}"] = errors("downsample", {"x": wide}, factor=factor)
        found[f"upsample times {factor}"] = errors("upsample", {"x": wide}, factor=factor)
        parts = {"x": draw(2, 32, 6, 4), "beside": x, "weight": draw(16, 48), "h": h, "bias": bias}
        found[f"project_residual_add times {factor}"] = errors("project_residual_add", parts, factor=factor)
    for shape, layer, first in (((3, 8, 4, 4), 0, 0), ((2, 5, 3, 7), 1, 2**33)):
        found[f"dropout of {shape}, layer {layer}, from row {first}"] = dropout_error(shape, layer, first)
    found["dropout, its derivatives"] = dropout_derivative_error()
    for shape, (_, second, *_) in NORMS.items():
        if not second:  # forward mode concatenates
            for silu in (False, True):
                found[f"forward mode: norm, {shape}, silu {silu}"] = norm_derivative_error(shape, silu)
    for name, params in small_networks().items():
        found[f"network {name}"] = network_error(params)
        found[f"forward mode: network {name}"] = network_derivative_error(params)
    params = small_networks()["edm2"].model_copy(update={"dropout": 0.2})
    found["network edm2, recomputed, with dropout"] = network_error(params, checkpointed=True)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    norm_device.libdevice = types.SimpleNamespace(fast_dividef=lambda a, b: a / b)  # CUDA's own, not interpreted
    modes.fuses = lambda x: not modes.is_plain()
    modes.fuses_forward_mode = lambda x: modes.is_forward_mode() and not torch.is_grad_enabled()
    least = residual.PROJECT["least"]
    kernels.projects = lambda x, beside: x.shape[1] % least == beside.shape[1] % least == 0  # float32 too
    print(json.dumps(all_errors()))
