"""conv_norm_map_bound: above the dense operator's norm and near it, and able to refuse."""

import itertools
import math

import pytest
import torch
from adversarial import FAMILIES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lipfast.ops.conv_norm_map as module
from lipfast.ops import conv_norm_map_bound
from lipfast.reference import conv2d_same, torus_bound

F64 = torch.float64
MODES = ["zeros", "circular"]
KERNELS = [(1, 1), (3, 3), (5, 5), (3, 1), (1, 5), (7, 3)]
SIZES = [(1, 1), (2, 1), (3, 4), (1, 6), (9, 7), (8, 8)]
CHANNELS = [(3, 3), (2, 4), (5, 1), (1, 3), (6, 6)]


def dense(kernel: Tensor, size: tuple[int, int], padding_mode: str) -> Tensor:
    n = kernel.shape[1] * math.prod(size)
    basis = torch.eye(n, dtype=F64).reshape(n, kernel.shape[1], *size)
    return conv2d_same(basis, kernel, None, padding_mode).flatten(1).T


def dense_norm(kernel: Tensor, size: tuple[int, int], padding_mode: str) -> float:
    return float(torch.linalg.matrix_norm(dense(kernel, size, padding_mode), 2))


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_above_the_norm_by_two_in_a_thousand_at_most(family, padding_mode):
    """15 x 2 x 8 = 240 kernels."""
    cases = list(itertools.product(KERNELS, SIZES, CHANNELS))
    generator = torch.Generator().manual_seed(len(family))
    for index in torch.randint(len(cases), (8,), generator=generator).tolist():
        taps, size, channels = cases[index]
        kernel = FAMILIES[family]((*channels, *taps), generator)
        true = dense_norm(kernel, size, padding_mode)
        bound = float(conv_norm_map_bound(kernel, size, padding_mode))
        assert true <= bound <= 1.002 * true, (taps, size, channels)


@pytest.mark.parametrize(("channels", "side"), [(32, 4), (12, 8)])
@pytest.mark.parametrize("padding_mode", MODES)
def test_wide_layers(channels, side, padding_mode):
    generator = torch.Generator().manual_seed(0)
    for family in ("random", "constant"):
        kernel = FAMILIES[family]((channels, channels, 3, 3), generator)
        true = dense_norm(kernel, (side, side), padding_mode)
        assert true <= float(conv_norm_map_bound(kernel, (side, side), padding_mode)) < 1.002 * true


@pytest.mark.parametrize("padding_mode", MODES)
def test_a_square_below_the_norm_is_refused(padding_mode):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        kernel = torch.randn(3, 3, 3, 3, dtype=F64, generator=generator)
        size = (4, 5)
        if padding_mode == "zeros":
            taps, rows = module._row_operators(kernel, size[1]), size[0]
        else:
            taps, rows = module._transfer_matrices(kernel, *size), 1
        norm = dense_norm(kernel, size, padding_mode)
        for factor in (0.5, 0.99, 1 - 1e-6, 1 - 1e-9):
            assert module._excess(taps, rows, (norm * factor) ** 2) is None
        for factor in (1 + 1e-9, 1 + 1e-4, 2.0):
            beta = (norm * factor) ** 2
            excess = module._excess(taps, rows, beta)
            assert excess is not None
            assert 0 < float(excess.amax()) < 1e-10 * beta


def test_a_wrong_factor_shows_in_the_bound(monkeypatch):
    """The proof trusts neither the factorisation nor the triangular solution."""
    kernel = torch.randn(3, 3, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    norm = dense_norm(kernel, (4, 4), "zeros")
    taps, beta = module._row_operators(kernel, 4), (0.9 * norm) ** 2
    exact = torch.linalg.cholesky_ex

    def claims_success(matrix: Tensor) -> tuple[Tensor, Tensor]:
        corner, info = exact(matrix)
        corner = torch.where(corner.isfinite(), corner, 0)
        corner.diagonal(dim1=1, dim2=2).clamp_(min=0.1 * norm)
        return corner, torch.zeros_like(info)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", claims_success)
    excess = module._excess(taps, 4, beta)
    assert excess is not None
    assert beta + float(excess) >= norm**2


@pytest.mark.parametrize(("shortage", "margin"), [(5e-5, 1e-4), (5e-4, 1e-3), (2e-3, 1e-2)])
def test_an_estimate_that_is_too_small_costs_tightness_only(shortage, margin, monkeypatch):
    kernel = torch.randn(4, 4, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    true = dense_norm(kernel, (5, 5), "zeros")
    exact = module._estimate
    monkeypatch.setattr(module, "_estimate", lambda *args: exact(*args) * (1 - shortage))
    bound = float(conv_norm_map_bound(kernel, (5, 5), "zeros"))
    assert bound == pytest.approx(true * (1 - shortage) * (1 + margin), rel=1e-6)


def test_hopeless_estimates_end_in_the_torus_bound(monkeypatch):
    kernel = torch.randn(3, 3, 3, 3, dtype=F64)
    monkeypatch.setattr(module, "_estimate", lambda *args: 1e-3)
    bound = float(conv_norm_map_bound(kernel, (4, 4), "zeros"))
    assert bound == pytest.approx(float(torus_bound(kernel)))


@pytest.mark.parametrize("grid", [64, 6])
def test_torus_for_maps_beyond_the_limit(grid, monkeypatch):
    monkeypatch.setattr(module, "_WORK_LIMIT", 0)
    monkeypatch.setattr(module, "_TORUS_GRID", grid)
    for family in ("random", "constant", "checkerboard"):
        kernel = FAMILIES[family]((3, 2, 3, 3), torch.Generator().manual_seed(0))
        for size in ((4, 4), (9, 7), (1, 6)):
            true = dense_norm(kernel, size, "zeros")
            bound = float(conv_norm_map_bound(kernel, size, "zeros"))
            assert true <= bound
            if grid == 64:
                assert bound <= 1.002 * max(
                    dense_norm(kernel, (h + 2, w + 2), "circular") for h, w in (size, size[::-1])
                )


@pytest.mark.parametrize("taps", [65, 67, 127])
def test_kernels_with_more_taps_than_the_grid_has_frequencies(taps):
    kernel = torch.zeros(1, 1, taps, 1, dtype=F64)
    kernel[0, 0, 0], kernel[0, 0, 64] = 1, -1  # cancel on 64 frequencies, norm 2 on the plane
    for bound in (torus_bound(kernel), conv_norm_map_bound(kernel, (70, 60), "circular")):
        assert 1.99 <= float(bound) <= 3


def test_frequencies_in_several_chunks(monkeypatch):
    kernel = torch.randn(3, 4, 3, 3, dtype=F64)
    whole = conv_norm_map_bound(kernel, (7, 6), "circular")
    monkeypatch.setattr(module, "_CHUNK", 200)
    torch.testing.assert_close(conv_norm_map_bound(kernel, (7, 6), "circular"), whole)


def test_row_operators_make_the_dense_operator():
    kernel = torch.randn(2, 3, 3, 5, dtype=F64)
    h, w = 4, 3
    taps = module._row_operators(kernel[..., 0:5], w)[:, 0]
    matrix = torch.zeros(h, 2 * w, h, 3 * w, dtype=F64)
    for r, p in itertools.product(range(h), range(h)):
        if abs(p - r) <= 1:
            matrix[r, :, p] = taps[p - r + 1]
    # rows and columns are ordered (row, column, channel)
    expected = dense(kernel, (h, w), "zeros").view(2, h, w, 3, h, w).permute(1, 2, 0, 4, 5, 3)
    torch.testing.assert_close(matrix.view(h, w, 2, h, w, 3), expected)


def test_values_without_a_norm():
    zero = torch.zeros(2, 2, 3, 3)
    assert conv_norm_map_bound(zero, (3, 3), "zeros") == 0
    assert conv_norm_map_bound(torch.zeros(0, 2, 3, 3), (3, 3), "circular") == 0
    for value in (math.nan, math.inf):
        assert conv_norm_map_bound(zero + value, (3, 3), "zeros").isnan()
    tap = zero.clone()
    tap[0, 0, 0, 0] = 1
    assert conv_norm_map_bound(tap, (1, 1), "zeros") == 0  # it meets the padding only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_gives_float64(dtype):
    kernel = torch.randn(3, 3, 3, 3).to(dtype)
    bound = conv_norm_map_bound(kernel, (4, 4), "zeros")
    assert bound.dtype == F64
    assert torch.equal(bound, conv_norm_map_bound(kernel.double(), (4, 4), "zeros"))


def test_is_opaque_and_registered():
    op = torch.ops.lipfast.conv_norm_map_bound.default
    kernel = torch.randn(2, 3, 3, 3)
    torch.library.opcheck(op, (kernel, 4, 5, "zeros"))
    with FakeTensorMode():
        assert conv_norm_map_bound(torch.empty(2, 3, 3, 3), (4, 5), "zeros").dtype == F64
    compiled = torch.compile(
        lambda k: k / conv_norm_map_bound(k, (4, 5), "zeros"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        compiled(kernel), kernel / conv_norm_map_bound(kernel, (4, 5), "zeros")
    )


K = torch.ones(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([1.0], (3, 3), "zeros"), TypeError, "kernel must be .* got list"),
        ((K.int(), (3, 3), "zeros"), TypeError, "kernel must be .* got torch.int32"),
        ((K[0], (3, 3), "zeros"), ValueError, r"kernel must have .* got \(2, 3, 3\)"),
        ((K[..., :2], (3, 3), "zeros"), ValueError, r"odd kh and kw, got \(2, 2, 3, 2\)"),
        ((K, (3, 0), "zeros"), ValueError, r"map_size must be .* got \(3, 0\)"),
        ((K, (3, 3), "reflect"), ValueError, "padding_mode must be .* got 'reflect'"),
    ],
)
def test_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        conv_norm_map_bound(*arguments)
