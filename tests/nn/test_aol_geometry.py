"""AOL with strides, dilations, groups, paddings and oblong kernels: norms, forms, gradients."""

import itertools
import math
import random
import re

import pytest
import torch
from adversarial import F64, FAMILIES, check, fill, norm_of, stored_layer
from torch import nn

from lipfast import certify
from lipfast import nn as lnn

MAPS = list(itertools.product(range(1, 10), range(1, 8)))
SEEDS = range(200)
GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def random_arguments(seed: int) -> dict[str, object]:
    """Constructor arguments; padding up to twice the kernel's extent where zeros allow it."""
    choose = random.Random(seed)
    kernel_size = (choose.choice((1, 3, 5, 7)), choose.choice((1, 3, 5)))
    dilation = (choose.choice((1, 1, 2, 3)), choose.choice((1, 1, 2)))
    padding_mode = ("zeros", "circular")[seed % 2]
    groups = choose.choice((1, 1, 2, 3))
    same = [d * (k // 2) for d, k in zip(dilation, kernel_size, strict=True)]
    widest = [4 * p + 1 if padding_mode == "zeros" else p for p in same]
    numbers = tuple(choose.randint(0, p) for p in widest)
    return {
        "in_channels": groups * choose.randint(1, 3),
        "out_channels": groups * choose.randint(1, 3),
        "kernel_size": kernel_size,
        "stride": (choose.choice((1, 1, 2, 3)), choose.choice((1, 1, 2))),
        "padding": choose.choice(("same", "same", "valid", numbers)),
        "dilation": dilation,
        "groups": groups,
        "padding_mode": padding_mode,
        "bias": False,
    }


def accepted_map(layer: lnn.AOLConv2d, seed: int) -> tuple[int, int]:
    """A map of 1x1 to 9x7, larger where the layer cannot take it."""
    sizes = zip(layer.kernel_size, layer.dilation, layer.padding, strict=True)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in sizes]
    chosen = random.Random(seed).choice(MAPS)
    return (max(least[0], chosen[0]), max(least[1], chosen[1]))


@pytest.mark.parametrize("seed", SEEDS)
def test_norm_of_any_geometry_is_below_the_bound(seed):
    layer = lnn.AOLConv2d(**random_arguments(seed), dtype=(torch.float32, F64)[seed // 2 % 2])
    fill(layer, list(FAMILIES)[seed % len(FAMILIES)], seed)
    size = accepted_map(layer, seed)
    check(layer.eval(), size)
    if layer.weight.dtype == F64:
        with torch.no_grad():
            assert norm_of(layer.train(), layer.in_channels, size) <= 1 + 1e-9


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("channels", "arguments"),
    [
        ((4, 4), {"kernel_size": 3}),
        ((4, 4), {"kernel_size": (3, 5), "dilation": 2}),
        ((6, 4), {"kernel_size": 3, "groups": 2}),
        ((3, 7), {"kernel_size": 1, "stride": 2}),
        ((4, 6), {"kernel_size": 3, "padding": 0}),
        ((2, 8), {"kernel_size": (1, 3), "stride": (1, 3), "groups": 2}),
    ],
)
@pytest.mark.parametrize("start", ["initial", "matrix at one tap"])
def test_bound_of_an_orthogonal_kernel_is_tight(start, channels, arguments, padding_mode):
    layer = lnn.AOLConv2d(*channels, **arguments, padding_mode=padding_mode, bias=False, dtype=F64)
    if start != "initial":
        with torch.no_grad():
            layer.weight.zero_()
            for block in layer.weight[:, :, -1, -1].chunk(layer.groups):
                nn.init.orthogonal_(block)
                block *= 20
                if block.shape[0] < block.shape[1]:  # orthogonal columns do not exist
                    block.copy_(20 * torch.eye(*block.shape, dtype=F64))
    norm = norm_of(stored_layer(layer.eval(), (9, 7)), channels[0], (9, 7))
    if start == "initial" and channels[0] > channels[1]:
        assert norm <= 1 + 1e-11
    else:
        assert 1 - 1e-5 <= norm <= 1 + 1e-11
    assert 1 - 1e-5 <= layer.lipschitz_bound() <= 1 + 1e-11


def test_wider_circular_padding_would_not_be_a_contraction():
    layer = lnn.AOLConv2d(1, 1, 3, padding=1, bias=False, dtype=F64).eval()
    layer.padding = (3, 3)
    assert norm_of(stored_layer(layer, (3, 3)), 1, (3, 3)) > 1.5


@pytest.mark.parametrize("seed", range(0, 200, 8))
def test_to_plain_and_effective_kernel_are_the_same_convolution(seed):
    for padding_mode in ("zeros", "circular"):
        arguments = random_arguments(seed) | {"padding_mode": padding_mode, "bias": True}
        if padding_mode == "circular" and not isinstance(arguments["padding"], str):
            arguments["padding"] = "same"
        layer = lnn.AOLConv2d(**arguments, dtype=F64)
        fill(layer, "random", seed)
        size = (15, 16)
        x = torch.randn(2, layer.in_channels, *size, dtype=F64)
        trained = layer(x)
        layer.eval()
        plain = layer.to_plain()
        assert type(plain) is nn.Conv2d
        for name in GEOMETRY:
            assert getattr(plain, name) == getattr(layer, name)
        torch.testing.assert_close(plain(x), layer(x))
        torch.testing.assert_close(plain(x[0]), layer(x[0]))
        torch.testing.assert_close(trained, layer(x))
        assert torch.equal(plain.weight, layer.effective_kernel())


def test_gradients_of_all_arguments_together():
    layer = lnn.AOLConv2d(4, 6, (3, 5), 2, (2, 3), (2, 1), 2, padding_mode="zeros", dtype=F64)
    fill(layer, "random", 0)
    x = torch.randn(2, 4, 5, 4, dtype=F64, requires_grad=True)
    values = (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_compiles_without_a_graph_break():
    layer = lnn.AOLConv2d(4, 6, (3, 1), 2, 1, 2, 2, padding_mode="zeros")
    x = torch.randn(2, 4, 9, 7)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_repr_and_certificates():
    layer = lnn.AOLConv2d(4, 6, (3, 1), 2, groups=2)
    for part in ("4, 6, kernel_size=(3, 1)", "stride=(2, 2)", "padding=(1, 0)", "groups=2"):
        assert part in repr(layer)
    model = nn.Sequential(layer, lnn.MaxMin(), lnn.AOLConv2d(6, 2, 3, dilation=2)).eval()
    assert model(torch.randn(1, 4, 8, 8)).shape == (1, 2, 4, 4)
    bounds = certify.lipschitz_bounds(model)
    assert list(bounds) == ["0", "2"]
    assert math.prod(bounds.values()) == certify.lipschitz_bound(model) <= 1 + 1e-6


def test_a_map_smaller_than_the_kernel():
    layer = lnn.AOLConv2d(4, 4, 3, padding="valid", dilation=(2, 1))
    with pytest.raises(ValueError, match=re.escape("h, w >= 5, 3, got shape (2, 4, 4, 3)")):
        layer(torch.randn(2, 4, 4, 3))
    assert layer(torch.randn(2, 4, 5, 3)).shape == (2, 4, 1, 1)
