"""Weights that are hard on a norm bound, and the true norm of a layer against its bound."""

import math

import torch
from torch import Tensor

from lipfast import nn as lnn

F64 = torch.float64
TARGET = 1 + 1e-6  # of the bound
ROUNDING = 1e-11  # of the dense norm and of the bound in float64


def rank_one(shape, generator):
    u, v = (
        torch.randn(n, generator=generator, dtype=F64) for n in (shape[0], math.prod(shape[1:]))
    )
    return torch.outer(u, v).reshape(shape)


def with_singular_values(shape, generator, values):
    rows, columns = shape[0], math.prod(shape[1:])
    n = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=F64)).Q
        for m in (rows, columns)
    )
    return ((left * values(n)) @ right.T).reshape(shape)


def dirac(shape):
    weight = torch.zeros(shape, dtype=F64)
    centre = tuple(n // 2 for n in shape[2:])
    for i in range(min(shape[0], shape[1])):
        weight[(i, i, *centre)] = 1
    return weight


def checkerboard(shape, generator):
    sign = torch.ones(shape, dtype=F64)
    for dim in range(len(shape) - 2, len(shape)):
        index = torch.arange(shape[dim]).reshape([-1] + [1] * (len(shape) - 1 - dim))
        sign = sign * (1 - 2 * (index % 2))
    return sign * (1 + 0.01 * torch.randn(shape, generator=generator, dtype=F64))


def sparse(shape, generator):
    weight = torch.randn(shape, generator=generator, dtype=F64)
    return weight * (torch.rand(shape, generator=generator) < 0.1)


def without(shape, generator, dim):
    weight = torch.randn(shape, generator=generator, dtype=F64)
    weight.select(dim, 0).zero_()
    return weight


def uneven(shape, generator, low, high):
    weight = torch.randn(shape, generator=generator, dtype=F64)
    exponent = torch.rand(shape[0], generator=generator, dtype=F64) * (high - low) + low
    return weight * (10**exponent).reshape([-1] + [1] * (len(shape) - 1))


FAMILIES = {
    "random": lambda s, g: torch.randn(s, generator=g, dtype=F64),
    "constant": lambda s, g: torch.ones(s, dtype=F64),
    "sparse": sparse,
    "rank one": rank_one,
    "zero row": lambda s, g: without(s, g, 0),
    "zero column": lambda s, g: without(s, g, 1),
    "huge": lambda s, g: 1e20 * torch.randn(s, generator=g, dtype=F64),
    "tiny": lambda s, g: 1e-20 * torch.randn(s, generator=g, dtype=F64),
    "uneven rows": lambda s, g: uneven(s, g, -12, 3),
    "orthogonal": lambda s, g: with_singular_values(s, g, lambda n: torch.ones(n, dtype=F64)),
    "dirac": lambda s, g: dirac(s),
    "nearly singular": lambda s, g: with_singular_values(
        s, g, lambda n: torch.tensor([1.0] * (n - 1) + [1e-7], dtype=F64)
    ),
    "ill conditioned": lambda s, g: with_singular_values(
        s, g, lambda n: torch.logspace(0, -9, n, dtype=F64)
    ),
    "checkerboard": checkerboard,
    "zero": lambda s, g: torch.zeros(s, dtype=F64),
}


def fill(layer: lnn.LipschitzModule, family: str, seed: int) -> None:
    """Adversarial weights, and other parameters far from their start."""
    generator = torch.Generator().manual_seed(seed)
    make = FAMILIES[family]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            shape = tuple(parameter.shape)
            if name == "bias":
                size = layer.weight.abs().amax()
                parameter.copy_(size * torch.randn(shape, generator=generator))
            elif name == "q":
                exponent = torch.rand(shape, generator=generator) * 10 - 8
                sign = 1 - 2 * torch.randint(0, 2, shape, generator=generator)
                parameter.copy_(sign * 10**exponent)
            elif name == "alpha":
                parameter.copy_(torch.rand((), generator=generator) * 30)
            elif len(shape) == 3:  # the matrices of BCOP
                parameter.copy_(torch.stack([make(shape[1:], generator) for _ in parameter]))
            else:
                parameter.copy_(make(shape, generator))


def stored_layer(layer: lnn.LipschitzModule, size: tuple[int, int]):
    """The evaluation layer with its stored weights, as a float64 function of (n, c, h, w)."""
    weights = layer._sound(layer._map_size(size)).weights
    wide = tuple(w.to(torch.complex128 if w.is_complex() else F64) for w in weights)
    return lambda x: layer._run(x, wide)


def norm_of(function, channels: int, size: tuple[int, int], *, at: Tensor | None = None) -> float:
    """The spectral norm of a linear map, or of the Jacobian at a point."""
    shape = (channels, *size)
    n = math.prod(shape)
    if at is None:
        matrix = function(torch.eye(n, dtype=F64).reshape(n, *shape)).flatten(1)
    else:
        matrix = torch.func.vmap(torch.func.jacrev(lambda x: function(x[None])[0]))(at[None])
        matrix = matrix.flatten(4).flatten(0, 3).reshape(-1, n)
    return float(torch.linalg.matrix_norm(matrix, 2))


def check(layer: lnn.LipschitzModule, size: tuple[int, int], *, target: float = TARGET) -> None:
    bound = layer.lipschitz_bound(size)
    assert bound <= target
    function = stored_layer(layer, size)
    c = layer.in_channels
    if type(layer) not in (lnn.CPLConv2d, lnn.SLLConv2d, lnn.CPLLinear, lnn.SLLLinear):
        assert norm_of(function, c, size) <= bound * (1 + ROUNDING)
        return
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 100.0):
        x, direction = scale * torch.randn(2, c, *size, generator=generator, dtype=F64)
        assert norm_of(function, c, size, at=x) <= bound * (1 + ROUNDING)
        for length in (1e-3, 1.0, 10.0):
            y = x + length * direction / direction.norm()
            expansion = (function(x[None]) - function(y[None])).norm() / (x - y).norm()
            assert float(expansion) <= bound * (1 + 1e-9)
