"""The true norm of every layer against its proved bound, over adversarial parameters."""

import itertools
import math

import pytest
import torch
from adversarial import F64, FAMILIES, ROUNDING, TARGET, check, fill, norm_of
from hypothesis import given, settings
from hypothesis import strategies as st
from moved_layers import settle_norm
from torch import Tensor, nn

from lipfast import certify, ops, reference
from lipfast import nn as lnn

METHODS = list(lnn.METHODS)
RESIDUAL = ("cpl", "sll")
SIZES = [(3, 4), (1, 1), (5, 5), (2, 1), (9, 7), (1, 6)]
CHANNELS = [(4, 4), (3, 4), (4, 2)]

few = settings(deadline=None, derandomize=True, max_examples=30)


def combinations(method: str):
    modes = lnn.METHODS[method].conv._padding_modes
    cases = itertools.product(modes, (1, 3, 5), CHANNELS)
    return [(*case, SIZES[i % len(SIZES)]) for i, case in enumerate(cases)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_bound_of_convolutions(method, family):
    cases = combinations(method)
    stride = 2 if len(cases) > 9 else 1
    for seed, (mode, k, channels, size) in enumerate(cases[len(family) % stride :: stride]):
        conv = (
            lnn.METHODS[method]
            .conv(*channels, k, padding_mode=mode, bias=method in RESIDUAL)
            .eval()
        )
        fill(conv, family, seed)
        check(conv, size)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_bound_of_linear_layers(method, family):
    for features in [(7, 7), (4, 9), (9, 4), (1, 1)]:
        linear = lnn.METHODS[method].linear(*features, bias=method in RESIDUAL).eval()
        fill(linear, family, sum(features))
        check(linear, (1, 1))


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_bound_of_other_storage_dtypes(method, dtype):
    for family in ("random", "orthogonal", "dirac", "rank one", "uneven rows"):
        for mode, k, channels, size in combinations(method)[3:6]:
            conv = (
                lnn.METHODS[method]
                .conv(*channels, k, padding_mode=mode, bias=method in RESIDUAL, dtype=dtype)
                .eval()
            )
            fill(conv, family, 0)
            check(conv, size)
        linear = lnn.METHODS[method].linear(32, 32, bias=method in RESIDUAL, dtype=dtype).eval()
        fill(linear, family, 0)
        check(linear, (1, 1))


@pytest.mark.parametrize("method", METHODS)
def test_float32_output_does_not_expand(method):
    size = (6, 5)
    for k in (1, 3):
        conv = lnn.METHODS[method].conv(8, 8, k, bias=False).eval()
        fill(conv, "random", k)
        if method in RESIDUAL:
            x, y = torch.randn(2, 512, 8, *size, generator=torch.Generator().manual_seed(k))
            y = x + 0.1 * y
            expansion = (conv(x) - conv(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
            assert float(expansion.max()) <= 1 + 1e-5
        else:
            assert norm_of(lambda x: conv(x.float()).double(), 8, size) <= TARGET  # noqa: B023


@pytest.mark.parametrize("method", METHODS)
def test_bound_after_large_steps(method):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, 5, 4, generator=generator)
    direction = torch.randn(8, 4, 5, 4, generator=generator)
    conv = lnn.METHODS[method].conv(4, 4, 3, bias=method in RESIDUAL)
    optimizer = torch.optim.SGD(conv.parameters(), lr=10.0, momentum=0.9)
    for _ in range(8):
        optimizer.zero_grad()
        (conv(x) * direction).sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in conv.parameters())
        optimizer.step()
        conv.eval()
        check(conv, (5, 4))
        conv.train()


@pytest.mark.parametrize("method", ["aol", "sll", "soc", "bcop"])
def test_training_layer_is_sound_too_where_the_method_promises_it(method):
    for family in ("random", "checkerboard", "rank one", "ill conditioned"):
        for mode, k, channels, size in combinations(method):
            conv = lnn.METHODS[method].conv(*channels, k, padding_mode=mode, bias=False, dtype=F64)
            fill(conv, family, k)
            settle_norm(conv)
            point = torch.randn(channels[0], *size, dtype=F64) if method in RESIDUAL else None
            with torch.no_grad():
                assert norm_of(conv, channels[0], size, at=point) <= 1 + 1e-9


@pytest.mark.parametrize("grid", [64, 7])
def test_torus_replaces_a_zero_padded_map_that_is_too_large(monkeypatch, grid):
    monkeypatch.setattr("lipfast.ops.conv_norm_map._WORK_LIMIT", 1)
    monkeypatch.setattr("lipfast.ops.conv_norm_map._TORUS_GRID", grid)
    for family, size in itertools.product(("random", "checkerboard", "constant"), SIZES):
        conv = lnn.CPLConv2d(3, 3, 3).eval()
        fill(conv, family, 0)
        check(conv, size)


exponents = st.floats(-12, 12)
seeds = st.integers(0, 2**31)
lengths = st.integers(1, 6)


def random_matrix(rows, columns, seed, exponent, *, complex_matrix=False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_matrix else F64
    return 10**exponent * torch.randn(rows, columns, generator=generator, dtype=dtype)


@few
@given(lengths, lengths, seeds, st.floats(-150, 150), st.booleans(), st.integers(1, 11))
def test_schatten_bound_is_above_the_norm_and_tight(
    rows, columns, seed, exponent, is_complex, squarings
):
    matrix = random_matrix(rows, columns, seed, exponent, complex_matrix=is_complex)
    norm = torch.linalg.svdvals(matrix).max()
    bound = reference.schatten_bound(matrix, squarings=squarings)
    assert norm * (1 - 1e-13) <= bound
    assert bound <= norm * min(rows, columns) ** (0.5 ** (squarings + 1)) * (1 + 1e-12)


@few
@given(lengths, lengths, seeds, exponents, st.booleans())
def test_contract_is_a_contraction_for_any_matrix(rows, columns, seed, exponent, is_complex):
    matrix = random_matrix(rows, columns, seed, exponent, complex_matrix=is_complex)
    contracted, bound = reference.contract(matrix[None])
    assert float(torch.linalg.matrix_norm(contracted[0], 2)) <= float(bound) <= 1 + 1e-11


@few
@given(seeds, st.sampled_from([1, 3, 5]), lengths, lengths, lengths, lengths)
def test_convolution_bounds_are_above_the_dense_norm(seed, k, c_out, c_in, h, w):
    kernel = random_matrix(c_out, c_in * k * k, seed, 0.0).reshape(c_out, c_in, k, k)
    basis = torch.eye(c_in * h * w, dtype=F64).reshape(-1, c_in, h, w)
    for mode in ("zeros", "circular"):
        dense = reference.conv2d_same(basis, kernel, None, mode).flatten(1)
        norm = float(torch.linalg.matrix_norm(dense, 2)) * (1 - 1e-12)
        exact = float(ops.conv_norm_map_bound(kernel, (h, w), mode))
        assert norm <= exact <= norm * 1.002
        assert norm <= float(reference.torus_bound(kernel))
        assert norm <= float(reference.unfolding_bound(kernel))
        q = random_matrix(1, c_in, seed, 0.0)[0].abs() + 1e-6
        assert norm <= float(reference.gram_bound(kernel, q).amax().sqrt())
        q = random_matrix(1, c_out, seed, 0.0)[0].abs() + 1e-6
        assert norm <= float(reference.gram_bound(kernel, q, axis="out").amax().sqrt())


@few
@given(seeds, st.integers(3, 12), st.integers(0, 5))
def test_torus_bound_holds_on_coarse_grids(seed, grid, family):
    k = 3 if grid < 5 else 5
    name = ("random", "checkerboard", "constant", "sparse", "rank one", "dirac")[family]
    kernel = FAMILIES[name]((2, 3, k, k), torch.Generator().manual_seed(seed))
    fine = torch.linalg.matrix_norm(reference.kernel_spectrum(kernel, (60, 60)), 2).max()
    assert float(fine) * (1 - 1e-12) <= float(reference.torus_bound(kernel, grid=grid))


@few
@given(seeds, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), exponents)
def test_round_contraction_proves_the_norm_of_what_it_stores(seed, dtype, exponent):
    matrix = random_matrix(5, 4, seed, min(exponent, 0.0))
    bound = torch.linalg.matrix_norm(matrix, 2)
    stored, stored_bound = reference.round_contraction(matrix[:, :, None, None], bound, dtype)
    norm = float(torch.linalg.matrix_norm(stored.double()[:, :, 0, 0], 2))
    assert norm <= float(stored_bound) * (1 + 1e-13)


@few
@given(st.integers(1, 14), st.floats(0, 8))
def test_taylor_supremum_is_the_largest_modulus(terms, limit):
    t = torch.linspace(0, limit, 20001, dtype=F64)
    values = sum((1j * t) ** k / math.factorial(k) for k in range(terms + 1))
    supremum = reference.taylor_supremum(terms, limit)
    assert float(values.abs().max()) <= supremum * (1 + 1e-12)
    assert supremum <= float(values.abs().max()) * (1 + 1e-5)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("k", [1, 2, 3, (2, 3), 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_certified_bound_of_plain_convolutions(k, stride, padding_mode):
    kh, kw = (k, k) if isinstance(k, int) else k
    torch.manual_seed(0)
    for padding in [(0, 0), ((kh - 1) // 2, (kw - 1) // 2), (kh, kw)]:
        if padding_mode == "circular" and padding == (kh, kw):
            continue
        conv = nn.Conv2d(3, 2, k, stride, padding, padding_mode=padding_mode, bias=False, dtype=F64)
        with torch.no_grad():
            norm = norm_of(conv, 3, (6, 7))
        assert norm <= certify.lipschitz_bound(conv) * (1 + ROUNDING)


def test_certified_bound_counts_a_shared_layer_as_often_as_it_stands_in_the_chain():
    linear = nn.Linear(3, 3, bias=False)
    linear.weight.data = 2 * torch.eye(3)
    assert certify.lipschitz_bound(nn.Sequential(linear, nn.ReLU(), linear)) >= 4
    shared = lnn.MaxMin()
    chain = nn.Sequential(linear, shared, linear, shared, nn.Linear(3, 2))
    result = certify.report(chain, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])
    assert result.lipschitz_bound >= 4 * certify.lipschitz_bound(chain[-1])


def test_certified_bound_refuses_what_is_not_finite():
    linear = nn.Linear(3, 3)
    for value in (math.nan, math.inf):
        linear.weight.data.fill_(value)
        with pytest.raises(ValueError, match="weight: expected finite"):
            certify.lipschitz_bound(nn.Sequential(linear))
