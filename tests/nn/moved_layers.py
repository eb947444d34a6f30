"""Layers away from the identity that some methods start with, for the tests of this folder."""

import math

import torch

from lipfast import nn as lnn
from lipfast import reference

METHODS = list(lnn.METHODS)
SIZES = [(1, 1), (1, 4), (5, 3), (4, 7), (6, 6)]


def make_conv(method: str, *args, seed: int = 0, **kwargs) -> lnn.LipschitzConv2d:
    torch.manual_seed(seed)
    layer = lnn.METHODS[method].conv(*args, **kwargs)
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn(layer.weight.shape))
    return layer


@torch.no_grad()
def settle_norm(layer: lnn.LipschitzModule) -> None:
    """Give SOC the vector that its power iteration converges to; other layers stay as they are."""
    if not isinstance(layer, (lnn.SOCConv2d, lnn.SOCLinear)):
        return
    kernel = layer._unit_skew_kernel(layer.weight.double())
    side = layer.power_vector.shape[-1]
    spectrum = reference.kernel_spectrum(kernel, (side, side))
    largest = int(torch.linalg.matrix_norm(spectrum, 2).argmax())
    row, column = divmod(largest, side // 2 + 1)
    vector = torch.linalg.svd(spectrum[largest]).Vh[0].conj()
    pixels = torch.arange(side, dtype=torch.float64) * (2 * math.pi / side)
    waves = [torch.exp(sign * 1j * (row * pixels[:, None] + column * pixels)) for sign in (1, -1)]
    vectors = [(vector[:, None, None] * wave).real[None] for wave in waves]
    norms = [reference.skew_power_iteration(kernel, vector)[0] for vector in vectors]
    layer.power_vector.copy_(vectors[int(norms[1] > norms[0])])
