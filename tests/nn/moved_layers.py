"""Layers away from the identity that some methods start with, for the tests of this folder."""

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
    """Give SOC the vectors that its power iterations converge to; other layers stay as they are."""
    if not isinstance(layer, (lnn.SOCConv2d, lnn.SOCLinear)):
        return
    kernel = layer._unit_skew_kernel(layer.weight.double())
    spectrum = reference.kernel_spectrum(kernel, (layer._side, layer._side))
    vectors = torch.linalg.svd(spectrum).Vh[:, 0].conj()
    layer.power_vector.copy_(torch.stack([vectors.real, vectors.imag]))
