"""polar: values, derivatives and norms, against singular value decompositions in float64."""

import math

import pytest
import torch
from torch import Tensor

from lipfast.ops import polar, polar_gemm
from lipfast.ops.polar_schedules import SCHEDULES, coefficients, lower

SHAPES = [(1, 1), (1, 4), (5, 1), (2, 2), (5, 5), (3, 7), (8, 3), (2, 3, 3), (2, 3, 4, 6), (33, 17)]
DTYPES = [torch.float64, torch.complex128]


def conditioned(
    shape: tuple[int, ...], ratio: float, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    """Matrices whose singular values fill [ratio, 1], both ends taken."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(
        torch.randn(shape, dtype=dtype, generator=generator), full_matrices=False
    )
    values = torch.rand(u.shape[-1], dtype=torch.float64, generator=generator)
    values = ratio + (1 - ratio) * values
    values[0], values[-1] = ratio, 1
    return (u * values.to(dtype)) @ vh


def definition(v: Tensor, ridge: float = 0.0) -> Tensor:
    u, values, vh = torch.linalg.svd(v, full_matrices=False)
    return (u * (values / (values**2 + ridge).sqrt()).to(v.dtype)[..., None, :]) @ vh


def derivative(v: Tensor, grad: Tensor) -> Tensor:
    """dL/dV of the polar factor from singular values, for m <= n."""
    u, values, vh = torch.linalg.svd(v, full_matrices=False)
    inner = u.mH @ grad @ vh.mH
    sums = values[..., :, None] + values[..., None, :]
    out = u @ ((inner - inner.mH) / sums) @ vh
    rest = grad - (grad @ vh.mH) @ vh
    return out + (u / values[..., None, :]) @ u.mH @ rest


def to_planar(v: Tensor) -> Tensor:
    return torch.stack([v.real, v.imag], dim=-3)


def from_planar(v: Tensor) -> Tensor:
    return torch.complex(*v.unbind(-3))


def defect(w: Tensor) -> float:
    """max over the matrices of norm_2(W W^H - I)."""
    values = torch.linalg.svdvals(w.to(torch.promote_types(w.dtype, torch.float64)))
    return (1 - values**2).abs().max().item()


def excess(w: Tensor) -> float:
    """Largest singular value minus 1."""
    return torch.linalg.svdvals(w.to(torch.promote_types(w.dtype, torch.float64))).max().item() - 1


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, dtype, ridge, poisoned_empty):
    v = conditioned(shape, 0.3, dtype)
    w = polar(v, ridge=ridge)
    assert w.shape == v.shape
    torch.testing.assert_close(w, definition(v, ridge), rtol=0, atol=1e-12)
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


@pytest.mark.parametrize("derivative_form", ["cg", "jvp"])
@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 16, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_float32_gradient(shape, dtype, derivative_form):
    exact_dtype = torch.complex128 if dtype.is_complex else torch.float64
    v = conditioned(shape, 1 / 7, exact_dtype)
    grad = torch.randn(shape, dtype=exact_dtype, generator=torch.Generator().manual_seed(1))
    exact = derivative(v, grad)
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
        torch.testing.assert_close(ours, definition(v, 1e-4), rtol=0, atol=1e-6)


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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("shape", [(612, 2, 16, 16), (60, 2, 64, 128), (3, 2, 200, 200)])
def test_gpu(shape, precision):
    generator = torch.Generator().manual_seed(0)
    v = 0.1 * torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    v[:, 0] += torch.eye(*shape[-2:])
    grad = torch.randn(shape, generator=generator)
    exact_grad = to_planar(derivative(from_planar(v.double()), from_planar(grad.double())))
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
