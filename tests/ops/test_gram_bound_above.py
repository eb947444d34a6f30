"""gram_bound_above: never below the exact row sums, whatever is lost to rounding."""

import pytest
import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import gram_bound, gram_bound_above

F32, F64 = torch.float32, torch.float64
NO_CPP = backends.cpp_can_run(torch.empty(0)) is not None
CPP = pytest.param("cpp", marks=pytest.mark.skipif(NO_CPP, reason="lipfast._C is not built"))


def cancelling(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Orthogonal filters: their correlations are rounding errors at float32."""
    rows = torch.randn(shape[0], shape[1:].numel(), generator=generator, dtype=F64)
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    return (left @ right).reshape(shape)


FAMILIES = {
    "random": lambda s, g: torch.randn(s, generator=g, dtype=F64),
    "positive": lambda s, g: torch.rand(s, generator=g, dtype=F64),
    "cancelling": cancelling,
    "uneven": lambda s, g: 10 ** (8 * torch.rand(s, generator=g, dtype=F64) - 4),
    "tiny": lambda s, g: 1e-21 * torch.randn(s, generator=g, dtype=F64),
    "tinier": lambda s, g: 1e-30 * torch.randn(s, generator=g, dtype=F64),
    "zero": lambda s, g: torch.zeros(s, dtype=F64),
    "sparse": lambda s, g: (
        torch.randn(s, generator=g, dtype=F64) * (torch.rand(s, generator=g) < 0.1)
    ),
}
SHAPES = [((1, 1, 1, 1), 1), ((24, 16, 3, 3), 1), ((8, 90), 1), ((12, 4, 3, 2), 3)]
SHAPES += [((3, 6, 5, 1, 3), 1), ((150, 9, 1, 1), 1)]


@pytest.mark.parametrize("backend", [CPP, "torch"])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_is_above_the_exact_value(family, with_q, axis, backend):
    for seed, (shape, groups) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(seed)
        weight = FAMILIES[family](torch.Size(shape), generator).float()
        first = len(shape) % 2
        channels = shape[first] if axis == "out" else shape[first + 1] * groups
        rows = (*shape[:first], channels)
        q = 10 ** (6 * torch.rand(rows, generator=generator, dtype=F64) - 3)
        q = q.float() if with_q else None
        arguments = {"axis": axis, "groups": groups, "backend": backend}
        above = gram_bound_above(weight, q, **arguments)
        wide = (weight.double(), None if q is None else q.double())
        exact = gram_bound(*wide, **(arguments | {"backend": "reference"}))
        assert above.dtype == F32
        assert above.shape == exact.shape
        assert (above >= exact * (1 - 1e-12)).all()
        assert above.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_is_close_where_nothing_cancels(dtype):
    weight = torch.rand(40, 30, 3, 3, dtype=dtype)
    above, r = gram_bound_above(weight), gram_bound(weight)
    assert (above > r).all()
    assert (above <= r * (1 + 1e4 * torch.finfo(dtype).eps)).all()


def test_float32_alone_would_be_below():
    weight = torch.rand(64, 64, 3, 3)
    exact = gram_bound(weight.double(), backend="reference")
    assert (gram_bound(weight) < exact).any()
    assert (gram_bound_above(weight) >= exact).all()


def test_refuses_what_is_not_proved():
    weight = torch.ones(3, 2, 3, 3)
    with pytest.raises(TypeError, match=r"weight must be .* got torch.bfloat16"):
        gram_bound_above(weight.bfloat16())
    with pytest.raises(ValueError, match="'reference' convolves"):
        gram_bound_above(weight, backend="reference")
    with pytest.raises(ValueError, match=r"operations are too many for torch.float32"):
        gram_bound_above(torch.ones(1, 1).expand(1, 2**23), axis="out")
    with pytest.raises(TypeError, match=r"weight must be a torch.Tensor"):
        gram_bound_above([[1.0]])


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_refuses_shortened_products(precision):
    weight = torch.ones(3, 2, 3, 3)
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(ValueError, match=r"must not be shortened; expected .*'highest'"):
            gram_bound_above(weight)
        assert gram_bound_above(weight.double()).dtype == F64
    finally:
        torch.set_float32_matmul_precision("highest")
    assert gram_bound_above(weight).dtype == F32


def test_autocast_does_not_round():
    weight = torch.randn(20, 30, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        above = gram_bound_above(weight)
    assert torch.equal(above, gram_bound_above(weight))


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (3, 0), (0, 2, 3, 3, 3)])
def test_no_channels(shape):
    assert not gram_bound_above(torch.empty(shape)).any()
