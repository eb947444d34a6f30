"""The reference ops against direct float64 formulas: dense operators, SVD, matrix exponential."""

import math

import pytest
import torch

from lipfast import reference

torch.manual_seed(0)
F64 = torch.float64
PADDINGS = ("zeros", "circular")


def dense_conv(kernel: torch.Tensor, h: int, w: int, padding_mode: str) -> torch.Tensor:
    """The matrix of a same-size convolution, entry by entry, from its definition."""
    out_channels, in_channels, kh, kw = kernel.shape
    matrix = torch.zeros(out_channels, h, w, in_channels, h, w, dtype=kernel.dtype)
    for y in range(h):
        for x in range(w):
            for i in range(kh):
                for j in range(kw):
                    v, u = y + i - kh // 2, x + j - kw // 2
                    if padding_mode == "circular":
                        v, u = v % h, u % w
                    if 0 <= v < h and 0 <= u < w:
                        matrix[:, y, x, :, v, u] += kernel[:, :, i, j]
    return matrix.reshape(out_channels * h * w, in_channels * h * w)


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 4), (5, 3)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_convolution_and_adjoint_match_the_dense_operator(size, k, padding_mode):
    h, w = size
    kernel = torch.randn(3, 2, k, k, dtype=F64)
    operator = dense_conv(kernel, h, w, padding_mode)
    x, y = torch.randn(2, 2, h, w, dtype=F64), torch.randn(2, 3, h, w, dtype=F64)
    forward = reference.conv2d_same(x, kernel, None, padding_mode)
    adjoint = reference.conv2d_same_adjoint(y, kernel, padding_mode)
    torch.testing.assert_close(forward.flatten(1), x.flatten(1) @ operator.T)
    torch.testing.assert_close(adjoint.flatten(1), y.flatten(1) @ operator)


def test_circular_padding_of_an_empty_batch_keeps_the_padded_shape():
    assert reference.circular_pad(torch.empty(0, 2, 3, 4), 1, 2).shape == (0, 2, 5, 8)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_gram_bound_is_the_row_sum_of_the_self_correlation(axis):
    weight = torch.randn(3, 4, 3, 2, dtype=F64)
    filters = weight.transpose(0, 1) if axis == "in" else weight
    n, _, kh, kw = filters.shape
    q = torch.rand(n, dtype=F64) + 0.1
    expected = torch.zeros(n, dtype=F64)
    for dy in range(1 - kh, kh):
        for dx in range(1 - kw, kw):
            gram = torch.zeros(n, n, dtype=F64)
            for i in range(kh):
                for j in range(kw):
                    if 0 <= i + dy < kh and 0 <= j + dx < kw:
                        gram += filters[:, :, i, j] @ filters[:, :, i + dy, j + dx].T
            expected += (gram.abs() @ q) / q
    torch.testing.assert_close(reference.gram_bound(weight, q, axis=axis), expected)
    ones = torch.ones(n, dtype=F64)
    torch.testing.assert_close(
        reference.gram_bound(weight, axis=axis), reference.gram_bound(weight, ones, axis=axis)
    )


@pytest.mark.parametrize("axis", ["in", "out"])
def test_gram_bound_gradient(axis):
    weight = torch.randn(2, 3, 3, 3, dtype=F64, requires_grad=True)
    q = (torch.rand(3 if axis == "in" else 2, dtype=F64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, q: reference.gram_bound(w, q, axis=axis), (weight, q))


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_aol_rescaled_operator_has_norm_at_most_one(padding_mode):
    for k in (1, 3):
        weight = torch.randn(4, 3, k, k, dtype=F64)
        kernel = weight * reference.aol_rescale(weight)[:, None, None]
        norm = torch.linalg.matrix_norm(dense_conv(kernel, 5, 4, padding_mode), 2)
        assert 0.5 < norm <= 1


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_polar_converges_to_the_ridged_polar_factor(shape, dtype):
    matrix = torch.randn(5, *shape, dtype=dtype) + 2 * torch.eye(*shape, dtype=dtype)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    expected = (u * (s / (s**2 + 1e-4).sqrt())[:, None, :].to(dtype)) @ vh
    result = reference.polar(matrix, iterations=40)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
def test_polar_and_bjorck_never_exceed_one_before_convergence(iterations):
    matrix = torch.randn(8, 6, 6, dtype=torch.complex128) * 10.0 ** torch.randn(8, 1, 1)
    norms = torch.linalg.matrix_norm(reference.polar(matrix, iterations=iterations), 2)
    assert norms.max() <= 1 + 1e-12
    scaled = matrix / torch.linalg.matrix_norm(matrix, 2, keepdim=True)
    norms = torch.linalg.matrix_norm(reference.bjorck(scaled, iterations=iterations), 2)
    assert norms.max() <= 1 + 1e-12


def test_bjorck_converges_to_the_polar_factor():
    for shape in [(5, 5), (3, 5), (5, 3)]:
        matrix = torch.randn(shape, dtype=F64)
        matrix = matrix / torch.linalg.matrix_norm(matrix, 2)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(reference.bjorck(matrix, iterations=60), u @ vh)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_cayley_is_orthogonal_and_differentiable(shape, dtype):
    matrix = torch.randn(2, *shape, dtype=dtype)
    q = reference.cayley(matrix)
    gram = q.mH @ q if shape[0] >= shape[1] else q @ q.mH
    torch.testing.assert_close(gram, torch.eye(min(shape), dtype=dtype).expand_as(gram))
    assert torch.autograd.gradcheck(reference.cayley, (matrix[:1].requires_grad_(),))


def test_cayley_inverts_to_its_skew_matrix():
    matrix = torch.randn(4, 4, dtype=F64)
    skew = matrix - matrix.T
    identity = torch.eye(4, dtype=F64)
    expected = torch.linalg.solve(identity + skew, identity - skew)
    torch.testing.assert_close(reference.cayley(matrix), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5), (4, 4), (5, 3), (6, 7)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_spectrum_and_fourier_conv_make_the_circular_convolution(size, k):
    kernel = torch.randn(3, 2, k, k, dtype=F64)
    x = torch.randn(2, 2, *size, dtype=F64)
    spectrum = reference.kernel_spectrum(kernel, size)
    assert spectrum.shape == (size[0] * (size[1] // 2 + 1), 3, 2)
    expected = reference.conv2d_same(x, kernel, None, "circular")
    torch.testing.assert_close(reference.fourier_conv(x, spectrum), expected)


def test_fourier_conv_of_an_empty_batch():
    spectrum = reference.kernel_spectrum(torch.randn(3, 2, 3, 3), (4, 4))
    assert reference.fourier_conv(torch.empty(0, 2, 4, 4), spectrum).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_skew_kernel_and_taylor_sum_match_the_matrix_exponential(padding_mode):
    kernel = reference.skew_kernel(torch.randn(2, 2, 3, 3, dtype=F64) / 4)
    operator = dense_conv(kernel, 4, 3, padding_mode)
    torch.testing.assert_close(operator, -operator.T)
    x = torch.randn(2, 2, 4, 3, dtype=F64)
    y = reference.skew_exp(x, kernel, 24, padding_mode)
    torch.testing.assert_close(y.flatten(1), x.flatten(1) @ torch.linalg.matrix_exp(operator).T)


def test_taylor_supremum_is_the_largest_modulus_on_the_interval():
    for terms in range(1, 13):
        for limit in (0.5, 1.0, 2.1, 3.5):
            t = torch.linspace(0, limit, 100_001, dtype=F64) * 1j
            value = sum(t**k / math.factorial(k) for k in range(terms + 1))
            supremum = reference.taylor_supremum(terms, limit)
            assert supremum == pytest.approx(float(value.abs().max()), rel=1e-8)
    assert reference.taylor_supremum(5, 2.1) == pytest.approx(1.0047, abs=1e-4)
    assert reference.taylor_supremum(12, 3.379) <= 1 + 1e-12
    assert reference.taylor_supremum(12, 3.39) > 1


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_torus_and_unfolding_bounds_hold_for_every_map(padding_mode):
    for k in (1, 3, 5):
        kernel = torch.randn(3, 4, k, k, dtype=F64)
        torus = float(reference.torus_bound(kernel))
        unfolding = float(reference.unfolding_bound(kernel))
        for size in [(1, 1), (3, 4), (9, 8)]:
            true = float(torch.linalg.matrix_norm(dense_conv(kernel, *size, padding_mode), 2))
            assert true <= torus * (1 + 1e-12)
            assert true <= unfolding * (1 + 1e-12)
        assert torus <= unfolding * 1.02


def test_unfolding_bound_of_a_skew_kernel_needs_two_unfoldings():
    kernel = reference.skew_kernel(torch.randn(4, 4, 3, 3, dtype=F64))
    torch.testing.assert_close(
        reference.unfolding_bound(kernel, skew=True), reference.unfolding_bound(kernel)
    )


def test_schatten_bound_is_between_the_norm_and_its_rank_factor():
    for scale in (1e-120, 1.0, 1e120):
        matrix = torch.randn(5, 4, 7, dtype=torch.complex128) * scale
        true = torch.linalg.matrix_norm(matrix, 2)
        for squarings in (0, 1, 5):
            bound = reference.schatten_bound(matrix, squarings=squarings)
            assert bool((bound >= true * (1 - 1e-12)).all())
            assert bool((bound <= true * 4 ** (1 / 2 ** (squarings + 1)) * (1 + 1e-12)).all())
    assert float(reference.schatten_bound(torch.zeros(3, 3))) == 0
    matrix = torch.randn(3, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.schatten_bound, (matrix,))


def test_power_iteration_converges_from_below():
    torch.manual_seed(2)  # of which the two largest singular values lie apart
    kernel = torch.randn(4, 3, 3, 3, dtype=F64)
    true = float(torch.linalg.matrix_norm(dense_conv(kernel, 6, 6, "zeros"), 2))
    start = torch.randn(1, 3, 6, 6, dtype=F64)
    cold, _ = reference.power_iteration(kernel, start, "zeros")
    warm, _ = reference.power_iteration(kernel, start, "zeros", steps=2000)
    assert float(cold) < 0.999 * true
    assert float(warm) == pytest.approx(true, rel=1e-6)
    zero, vector = reference.power_iteration(torch.zeros_like(kernel), start, "zeros")
    assert float(zero) == 0
    assert bool(vector.isfinite().all())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_block_conv_of_projectors_is_orthogonal_on_the_torus(k):
    def orthogonal(n):
        return torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q

    halves = [orthogonal(4)[:, :2] for _ in range(2 * (k - 1))]
    projectors = torch.stack([h @ h.T for h in halves]) if halves else torch.empty(0, 4, 4)
    kernel = reference.block_conv(orthogonal(4)[:3], projectors.double())
    assert kernel.shape == (3, 4, k, k)
    spectrum = reference.kernel_spectrum(kernel, (5, 6))
    identity = torch.eye(3, dtype=torch.complex128)
    torch.testing.assert_close(spectrum @ spectrum.mH, identity.expand(len(spectrum), 3, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_contract_proves_norm_one_for_any_matrix(dtype):
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=dtype))
    spectrum = torch.tensor([1.0, 1.4, 1.9, 0.3, 1e-8, 0.0], dtype=F64).to(dtype)
    cases = [q * spectrum, 100 * torch.randn(6, 4, dtype=dtype), torch.zeros(2, 3, dtype=dtype), q]
    for matrix in cases:
        contracted, bound = reference.contract(matrix)
        assert float(torch.linalg.matrix_norm(contracted, 2)) <= float(bound) <= 1 + 1e-12
    near = q * (1 - 1e-4)
    contracted, _ = reference.contract(near)
    defect = torch.linalg.matrix_norm(contracted @ contracted.mH - torch.eye(6, dtype=dtype), 2)
    assert float(defect) < 1e-7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_contract_proves_nothing_of_values_that_are_not_finite(value):
    matrices = torch.eye(3, dtype=F64).repeat(2, 1, 1)
    matrices[1, 0, 2] = value
    assert reference.contract(matrices)[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_contraction_never_exceeds_its_bound(dtype):
    one = torch.ones((), dtype=F64)
    for _ in range(20):
        q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=F64))
        weight, bound = reference.round_contraction(q[:, :, None, None], one, dtype)
        norm = torch.linalg.matrix_norm(weight[:, :, 0, 0].double(), 2)
        assert float(norm) <= float(bound) <= 1
        spectrum, bound = reference.round_contraction(q.to(torch.complex128)[None], one, dtype)
        assert spectrum.dtype == torch.complex64
        assert float(torch.linalg.matrix_norm(spectrum[0].to(torch.complex128), 2)) <= float(bound)
