"""Layers away from the identity that some methods start with, for the tests of this folder."""

import torch

from lipfast import nn as lnn

METHODS = list(lnn.METHODS)
SIZES = [(1, 1), (1, 4), (5, 3), (4, 7), (6, 6)]


def make_conv(method: str, *args, seed: int = 0, **kwargs) -> lnn.LipschitzConv2d:
    torch.manual_seed(seed)
    layer = lnn.METHODS[method].conv(*args, **kwargs)
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn(layer.weight.shape))
    return layer
