"""Small functions in place of networks, which depend on all of their inputs and write down each call; and a batch."""

from collections import namedtuple

import torch
from torch import nn

from cm_core.methods.base import Batch

SIZE, SHAPE = 600, (3, 2, 2)
Call = namedtuple("Call", "x sigma labels grad")


class Toy(nn.Module):
    """A smooth function of x, sigma, labels and augmentation; its raw network is another."""

    def __init__(self, gain):
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.tensor(gain, dtype=torch.float64)), []

    def value(self, x, sigma, labels=None, augment_labels=None):
        sigma, shift = sigma.double()[:, None, None, None], 0.0
        if labels is not None:
            shift = 0.2 * (labels + 1)[:, None, None, None]
        if augment_labels is not None:
            shift = shift + 0.1 * augment_labels.double().sum(1)[:, None, None, None]
        return self.gain * (x + shift).sin() / (1 + sigma)

    def forward(self, x, sigma, labels=None, augment_labels=None):
        self.calls.append(Call(x, sigma, labels, torch.is_grad_enabled()))
        return self.value(x, sigma, labels, augment_labels)

    def velocity(self, z, t, span, labels=None, augment_labels=None):
        return self.forward(z, t, labels, augment_labels) * (1 + 0.5 * spread(span.double()))

    def raw(self, x_in, sigma, labels=None, augment_labels=None):
        return self.forward(x_in, sigma, labels, augment_labels).cos()


def the_batch():
    generator = torch.Generator().manual_seed(11)
    x0 = 0.5 * torch.randn(SIZE, *SHAPE, generator=generator, dtype=torch.float64)
    return Batch(x0, torch.arange(SIZE) % 3)


def spread(v):
    return v[:, None, None, None]


def is_unit_noise(eps):
    assert abs(eps.mean()) < 0.05 and abs(eps.var() - 1) < 0.05
    assert eps.flatten(1).std(0).min() > 0.8, "each pixel of each image has noise of its own"
    return True
