"""polar: norms, and what happens to matrices that no iteration likes."""

import math

import pytest
import torch
from polar_definition import (
    conditioned,
    defect,
    excess,
    from_planar,
    polar_derivative,
    to_planar,
)
from torch import Tensor

from lipfast.ops import polar, polar_gemm
from lipfast.ops.polar_schedules import SCHEDULES


def orthogonal_noise(channels: int, noise: float) -> Tensor:
    """Identity + noise at 20 frequencies, planar, float32."""
    generator = torch.Generator().manual_seed(0)
    v = noise * torch.randn(20, 2, channels, channels, generator=generator) / math.sqrt(2) * 3
    v[:, 0] += torch.eye(channels)
    return v


@pytest.mark.parametrize(
    ("v", "bound"),
    [
        (orthogonal_noise(16, 0.02), 1e-6),
        (orthogonal_noise(64, 0.02), 1e-6),
        (orthogonal_noise(16, 0.05), 1e-5),
        (torch.randn(20, 2, 32, 64, generator=torch.Generator().manual_seed(0)), 1e-5),
    ],
)
def test_float32_orthogonality(v, bound):
    w = polar(v, planar=True)
    assert defect(from_planar(w)) < bound
    assert excess(from_planar(w)) < 1e-6


def awkward(seed: int) -> Tensor:
    """One of many matrices that an iteration may not like; float32 or complex64."""
    generator = torch.Generator().manual_seed(seed)
    m, n = torch.randint(1, 40, (2,), generator=generator).tolist()
    dtype = [torch.float64, torch.complex128][seed % 2]
    scale = [1.0, 1e-20, 1e20, 1e-4, 1e6][seed // 8 % 5]
    kind = seed // 2 % 8
    v = torch.randn(m, n, dtype=dtype, generator=generator)
    if kind == 1:
        v = conditioned((m, n), 10.0 ** -(seed % 9), dtype, seed)
    elif kind == 2:
        v = conditioned((m, n), 1.0, dtype, seed)
    elif kind == 3:
        v[:, : n // 2], v[m // 2 :] = 0, 0
    elif kind == 4:
        v = v[:, :1] @ v[:1]
    elif kind == 5:
        v = torch.eye(m, n, dtype=dtype)
    elif kind == 6:
        v = torch.ones(m, n, dtype=dtype)
    elif kind == 7:
        v *= torch.logspace(0, -30, n, dtype=torch.float64)
    return (scale * v).to(torch.complex64 if seed % 2 else torch.float32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_norm_never_exceeds_one(schedule):
    for seed in range(200):
        v = awkward(seed).requires_grad_()
        for derivative_form in ("cg", "jvp"):
            w = polar(v, schedule=schedule, derivative=derivative_form)
            assert excess(w.detach()) <= 1e-6, seed
            (grad,) = torch.autograd.grad(w, v, torch.randn_like(w))
            assert grad.isfinite().all(), (seed, derivative_form)


def test_gradients_stay_bounded_without_convergence():
    for seed in range(200):
        v = awkward(seed)
        double = torch.promote_types(v.dtype, torch.float64)
        norm = torch.linalg.matrix_norm(v.to(double), 2)
        grad = torch.randn_like(v)
        grad /= torch.linalg.matrix_norm(grad)
        v.requires_grad_()
        for derivative_form, bound in (("cg", 100), ("jvp", 50)):
            (ours,) = torch.autograd.grad(polar(v, derivative=derivative_form), v, grad)
            size = torch.linalg.matrix_norm(ours.to(double)) * norm
            assert size < bound, (seed, derivative_form)


@pytest.mark.parametrize("derivative_form", ["cg", "jvp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 3, 5)])
def test_zero_matrices(shape, dtype, derivative_form):
    v = torch.zeros(shape, dtype=dtype)
    v[1, :, :3] = torch.eye(len(v[1]), 3)
    v.requires_grad_()
    w = polar(v, derivative=derivative_form)
    assert not w[0].any()
    (grad,) = torch.autograd.grad(w, v, torch.ones_like(w))
    assert grad.isfinite().all()
    v = torch.zeros(shape, dtype=dtype, requires_grad=True)
    w = polar(v, backend="reference")
    assert not w.any()
    assert torch.autograd.grad(w, v, torch.ones_like(w))[0].isfinite().all()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("derivative_form", ["cg", "jvp"])
def test_extreme_scales(derivative_form, size, scale):
    """W does not depend on the scale; the gradient divides by it, and may overflow to Inf."""
    v = torch.tril(torch.rand(3, 3, 4)) + 1
    grad = size * torch.randn(3, 3, 4)
    results = []
    for factor in (1.0, scale):
        x = (factor * v).requires_grad_()
        w = polar(x, derivative=derivative_form, schedule="55555nn")
        results += [w.detach(), *torch.autograd.grad(w, x, grad)]
    w, gradient, scaled_w, scaled = results
    torch.testing.assert_close(scaled_w, w, rtol=0, atol=1e-3 if scale == 1e-40 else 1e-5)
    assert not scaled.isnan().any()
    number = torch.full((1, 1), scale, requires_grad=True)
    w = polar(number, derivative=derivative_form)
    (flat,) = torch.autograd.grad(w, number, torch.full((1, 1), size))
    assert not flat.isnan().any()
    if derivative_form == "cg":
        assert flat == 0
    if 1e-35 < size / scale < 1e35:
        torch.testing.assert_close(scale * scaled / size, gradient / size, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 5, 2)])
def test_not_finite_shows_in_its_own_matrix(shape, bad):
    v = torch.randn(shape)
    clean = polar(v)
    v[1, 1, 0] = bad
    v.requires_grad_()
    w, residual = polar(v, return_residual=True)
    assert w[1].isnan().all()
    assert residual[1].isnan()
    torch.testing.assert_close(w[::2], clean[::2])
    (grad,) = torch.autograd.grad(w[::2].sum() + w[1].nansum(), v)
    assert grad[::2].isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_residual_bounds_the_defect(schedule, dtype):
    double = torch.promote_types(dtype, torch.float64)
    for ratio in (1.0, 0.3, 0.1, 0.03, 1e-3, 0.0):
        v = conditioned((2, 6, 9), ratio, double).to(dtype)
        w, residual = polar(v, schedule=schedule, return_residual=True)
        assert residual.shape == (2,)
        assert not residual.requires_grad
        bound = 0.75 * residual**2 + 0.25 * residual**3
        values = torch.linalg.svdvals(w.to(double))
        assert ((1 - values**2).abs().amax(-1) <= bound + 2e-6).all()
    w, residual = polar(v, return_residual=True, backend="reference")
    gram = w @ w.mH - torch.eye(6)
    torch.testing.assert_close(residual, torch.linalg.matrix_norm(gram))


def test_short_products_do_not_reach_the_last_step():
    v = orthogonal_noise(32, 0.05)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16, on a CPU that has it
        w = polar(v, planar=True)
    finally:
        torch.set_float32_matmul_precision(before)
    assert excess(from_planar(w)) <= 1e-6


def test_split_is_exact_in_two_short_parts():
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    high, low = polar_gemm._split(x)
    assert torch.equal(high + low, x)
    assert not (high.view(torch.int32) & 0x1FFF).any()  # TF32 keeps 10 bits after the point
    assert (low.abs() <= 2.0**-11 * x.abs()).all()


def test_split_products_survive_tf32(monkeypatch):
    def cut(x: Tensor) -> Tensor:
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    bmm, baddbmm = torch.bmm, torch.baddbmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(cut(a), cut(b)))
    monkeypatch.setattr(torch, "baddbmm", lambda c, a, b: baddbmm(c, cut(a), cut(b)))
    a, b = torch.randn(2, 50, 60), torch.randn(2, 60, 40)
    exact = a.double() @ b.double()
    errors = [(f(a, b) - exact).norm() / exact.norm() for f in (torch.bmm, polar_gemm._split_bmm)]
    assert errors[0] > 1e-4
    assert errors[1] < 2 * (bmm(a, b) - exact).norm() / exact.norm() + 1e-7


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("shape", [(612, 2, 16, 16), (60, 2, 64, 128), (3, 2, 200, 200)])
def test_gpu(shape, precision):
    generator = torch.Generator().manual_seed(0)
    v = 0.1 * torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    v[:, 0] += torch.eye(*shape[-2:])
    grad = torch.randn(shape, generator=generator)
    exact_grad = to_planar(polar_derivative(from_planar(v.double()), from_planar(grad.double())))
    before = torch.get_float32_matmul_precision()
    runs = []
    try:
        torch.set_float32_matmul_precision(precision)
        for _ in range(2):
            x = v.cuda().requires_grad_()
            w = polar(x, planar=True, backend="torch")
            runs.append((w, *torch.autograd.grad(w, x, grad.cuda())))
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(map(torch.equal, *runs))
    w, ours = (t.detach().cpu() for t in runs[0])
    assert excess(from_planar(w)) <= 1e-6
    assert defect(from_planar(w)) <= (1e-6 if precision == "highest" else 1e-5)
    tolerance = 1e-3 if precision == "highest" else 5e-3
    assert (ours.double() - exact_grad).norm() < tolerance * exact_grad.norm()
