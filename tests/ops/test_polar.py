"""polar: values and derivatives, against singular value decompositions in float64."""

import pytest
import torch
from polar_definition import (
    conditioned,
    defect,
    from_planar,
    polar_derivative,
    polar_factor,
    to_planar,
)
from torch import Tensor

from lipfast.ops import polar, polar_gemm
from lipfast.ops.polar_schedules import SCHEDULES, coefficients, lower

SHAPES = [(1, 1), (1, 4), (5, 1), (2, 2), (5, 5), (3, 7), (8, 3), (2, 3, 3), (2, 3, 4, 6), (33, 17)]
DTYPES = [torch.float64, torch.complex128]


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, dtype, ridge, poisoned_empty):
    v = conditioned(shape, 0.3, dtype)
    w = polar(v, ridge=ridge)
    assert w.shape == v.shape
    torch.testing.assert_close(w, polar_factor(v, ridge), rtol=0, atol=1e-12)
    if ridge == 0:
        assert defect(w) < 1e-12
    as_tensor = polar(v, ridge=torch.tensor(ridge))
    torch.testing.assert_close(as_tensor, w, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 8), (2, 6, 3)])
def test_planar_layout(shape):
    v = conditioned(shape, 0.3, torch.complex128)
    parts = to_planar(v).requires_grad_()
    w = polar(parts, planar=True)
    torch.testing.assert_close(from_planar(w), polar(v), rtol=0, atol=1e-14)
    grad = torch.randn_like(v)
    (ours,) = torch.autograd.grad(w, parts, to_planar(grad))
    v.requires_grad_()
    torch.testing.assert_close(from_planar(ours), torch.autograd.grad(polar(v), v, grad)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_converge_where_they_promise_to(schedule, dtype):
    # a flat spectrum but for one value: the normaliser is m^(1/4) at most
    v = conditioned((6, 6), min(1.0, 2 * lower(schedule)), dtype)
    assert defect(polar(v, schedule=schedule)) < 1e-12


@pytest.mark.parametrize("derivative_form", ["cg", "jvp"])
@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 16, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_float32_gradient(shape, dtype, derivative_form):
    exact_dtype = torch.complex128 if dtype.is_complex else torch.float64
    v = conditioned(shape, 1 / 7, exact_dtype)
    grad = torch.randn(shape, dtype=exact_dtype, generator=torch.Generator().manual_seed(1))
    exact = polar_derivative(v, grad)
    v, grad = v.to(dtype).requires_grad_(), grad.to(dtype)
    (ours,) = torch.autograd.grad(polar(v, derivative=derivative_form), v, grad)
    error = (ours.to(exact_dtype) - exact).norm() / exact.norm()
    assert error < (1e-3 if derivative_form == "cg" else 1e-5)


@pytest.mark.parametrize("derivative_form", ["cg", "jvp"])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 3), (2, 2, 5), (5, 3)])
def test_gradcheck(shape, dtype, ridge, derivative_form):
    v = conditioned(shape, 0.3, dtype).requires_grad_()

    def function(v: Tensor) -> Tensor:
        return polar(v, ridge=ridge, derivative=derivative_form)

    assert torch.autograd.gradcheck(function, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 6)])
def test_jvp_is_the_derivative_of_the_schedule(shape, dtype):
    v = conditioned(shape, 1e-4, dtype).requires_grad_()  # far from convergence
    grad = torch.randn(shape, dtype=dtype)
    steps = coefficients("535nn", True)
    square = (v @ v.mH) @ (v @ v.mH)
    bounds = torch.linalg.matrix_norm(square), torch.linalg.matrix_norm(square, torch.inf)
    nu = torch.minimum(*bounds).sqrt() * (1 + 1e-5)
    x = v / nu.detach().sqrt()[..., None, None]
    for a, b, c in steps:
        gram = x @ x.mH
        x = a * x + b * gram @ x + c * gram @ gram @ x
    w = polar(v, derivative="jvp")
    torch.testing.assert_close(w, x, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(x, v, grad)
    torch.testing.assert_close(torch.autograd.grad(w, v, grad), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["newton", "bjorck"])
@pytest.mark.parametrize("layout", ["real", "complex", "planar"])
def test_agrees_with_the_published_iterations(form, layout):
    v = conditioned((2, 5, 8), 0.4, torch.float64 if layout == "real" else torch.complex128)
    v = to_planar(v) if layout == "planar" else v
    v.requires_grad_()
    grad = torch.randn_like(v)
    planar = layout == "planar"
    ours = polar(v, planar=planar)
    theirs = polar(v, planar=planar, form=form, backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    pairs = zip(*(torch.autograd.grad(w, v, grad) for w in (ours, theirs)), strict=True)
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in pairs)


def test_published_ridge():
    v = 2.0 * torch.randn(3, 6, 6, dtype=torch.complex128)
    for ridge in (1e-4, torch.tensor(1e-4)):
        theirs = polar(v, ridge=ridge, backend="reference")
        ours = polar(v, ridge=ridge, schedule="55555nn")
        singular = torch.linalg.svdvals(v)[..., -1]
        close = singular > 0.5  # ten Newton steps do not converge below
        torch.testing.assert_close(ours[close], theirs[close], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours, polar_factor(v, 1e-4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("planar", [False, True])
def test_any_strides(planar):
    v = torch.randn(5, 2, 4, 6, dtype=torch.float64)
    expected = polar(v, planar=planar)
    for order in [(3, 2, 1, 0), (1, 0, 3, 2), (0, 3, 1, 2)]:
        moved = v.permute(order).contiguous()
        inverse = [order.index(i) for i in range(4)]
        same = moved.permute(inverse).requires_grad_()
        w = polar(same, planar=planar)
        assert torch.equal(w, expected)
        grad = torch.randn(5, 4, 2, 6, dtype=torch.float64).transpose(1, 2)
        (ours,) = torch.autograd.grad(w, same, grad)
        base = v.clone().requires_grad_()
        (theirs,) = torch.autograd.grad(polar(base, planar=planar), base, grad.contiguous())
        assert torch.equal(ours, theirs)


def test_blocks_change_nothing(monkeypatch):
    v = torch.randn(37, 2, 5, 5).requires_grad_()
    grad = torch.randn_like(v)
    results = []
    for size in (1, 1 << 10, 1 << 30):
        monkeypatch.setattr(polar_gemm, "_BLOCK_BYTES", size)
        w, residual = polar(v, planar=True, return_residual=True)
        results.append((w, residual, *torch.autograd.grad(w, v, grad)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty(shape, backend):
    for dtype in (torch.float32, torch.complex64):
        v = torch.zeros(shape, dtype=dtype, requires_grad=True)
        w, residual = polar(v, return_residual=True, backend=backend)
        assert (w.shape, residual.shape) == (shape, shape[:-2])
        assert torch.autograd.grad(w.abs().sum(), v)[0].shape == shape
    parts = torch.zeros(0, 2, 3, 4, requires_grad=True)
    w, residual = polar(parts, planar=True, return_residual=True, backend=backend)
    assert (w.shape, residual.shape) == (parts.shape, (0,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_computed_in_float32(dtype):
    v = torch.randn(4, 5).to(dtype).requires_grad_()
    w, residual = polar(v, return_residual=True)
    assert (w.dtype, residual.dtype) == (dtype, dtype)
    assert torch.equal(w, polar(v.float()).to(dtype))
    assert torch.autograd.grad(w.sum(), v)[0].dtype == dtype


def test_autocast_does_not_round():
    v = torch.randn(40, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        w = polar(v)
    (grad,) = torch.autograd.grad(w.sum(), v)
    plain = polar(v)
    assert torch.equal(w, plain)
    assert torch.equal(grad, torch.autograd.grad(plain.sum(), v)[0])
