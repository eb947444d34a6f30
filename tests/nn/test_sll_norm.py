"""SLL: the true norm of its scaled convolution against the bound, over maps and weights."""

import itertools
import math
import random

import pytest
import torch
from adversarial import F64, FAMILIES, ROUNDING, TARGET, fill, norm_of
from torch import nn

from lipfast import nn as lnn
from lipfast import reference

MAPS = list(itertools.product(range(1, 10), range(1, 8)))
SEEDS = range(200)


def scaled_norm(layer: lnn.SLLConv2d, weights: tuple[torch.Tensor, ...], size: tuple[int, int]):
    """The norm of t^(1/2) W: at any point the Jacobian is I - W^T D W with 0 <= D <= t."""
    kernel, _, t = (w.detach().to(F64) for w in weights)
    scaled = kernel * t.sqrt()[:, None, None, None]
    return norm_of(
        lambda x: reference.conv2d_same(x, scaled, None, layer.padding_mode), kernel.shape[1], size
    )


def make(seed: int) -> lnn.SLLConv2d:
    choose = random.Random(seed)
    layer = lnn.SLLConv2d(
        choose.randint(1, 5),
        choose.randint(1, 5),
        choose.choice((1, 3, 5)),
        padding_mode=("zeros", "circular")[seed % 2],
        dtype=(torch.float32, F64)[seed // 2 % 2],
    )
    fill(layer, list(FAMILIES)[seed % len(FAMILIES)], seed)
    return layer


@pytest.mark.parametrize("seed", SEEDS)
def test_norm_is_below_the_bound(seed):
    layer, size = make(seed).eval(), random.Random(seed).choice(MAPS)
    bound = layer.lipschitz_bound(size)
    assert bound <= TARGET
    weights = layer._sound(layer._map_size(size)).weights
    assert scaled_norm(layer, weights, size) ** 2 <= (1 + bound) * (1 + ROUNDING)
    if layer.weight.dtype == F64:
        trained = layer.train()._weights(size, torch.zeros(1, layer.in_channels, *size, dtype=F64))
        assert scaled_norm(layer, trained, size) ** 2 <= 2 * (1 + 1e-9)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("tap", [0, -1])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_bound_of_an_orthogonal_kernel_is_tight(scale, tap, padding_mode):
    layer = lnn.SLLConv2d(5, 5, 3, padding_mode=padding_mode, dtype=F64)
    with torch.no_grad():
        layer.weight.zero_()
        nn.init.orthogonal_(layer.weight[:, :, tap, tap])
        layer.weight *= scale
    weights = layer.eval()._sound((9, 7)).weights
    norm = scaled_norm(layer, weights, (9, 7)) / math.sqrt(2)
    assert 1 - 1e-5 <= norm <= 1 + 1e-11
    assert layer.lipschitz_bound() <= 1 + 1e-11
