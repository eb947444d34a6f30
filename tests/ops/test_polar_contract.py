"""polar: registration, work, memory, determinism, choice of backend, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import lipfast
from lipfast import backends
from lipfast.ops import polar, polar_gemm
from lipfast.ops.polar_schedules import coefficients
from lipfast.saved import saved_tensors

OP = torch.ops.lipfast.polar.default
BACKWARD_OP = torch.ops.lipfast.polar_backward.default


@pytest.mark.parametrize("derivative", ["cg", "jvp"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (2, 1, 3, 5)])
def test_registration(shape, derivative):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    options = ("535nn", derivative, 8, "torch")
    torch.library.opcheck(OP, (x, *options))
    strided = torch.randn(shape[::-1]).permute(3, 2, 1, 0).requires_grad_()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OP, (strided, *options), test_utils=tests)
    w, _ = OP(x.detach(), *options)
    saved = w if derivative == "cg" else None
    torch.library.opcheck(BACKWARD_OP, (torch.randn_like(w), x.detach(), saved, *options))


def test_fake_tensors_have_shape_and_dtype():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        w, residual = polar(
            torch.empty(7, 5, 3, dtype=torch.complex64), ridge=1e-4, return_residual=True
        )
        assert (w.shape, w.dtype) == ((7, 5, 3), torch.complex64)
        assert (residual.shape, residual.dtype) == ((7,), torch.float32)
        w, residual = OP(torch.empty(9, 2, 4, 4, device="cuda"), "55n", "cg", 8, "triton")
        assert (w.device.type, w.shape, residual.shape) == ("cuda", (9, 2, 4, 4), (9,))


@pytest.mark.parametrize("layout", ["planar", "complex", "real"])
def test_training_step_is_one_graph(layout):
    def step(v: Tensor) -> Tensor:
        w, residual = polar(v, planar=layout == "planar", ridge=1e-3, return_residual=True)
        return w.abs().pow(3).sum() + residual.sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for shape in [(3, 2, 4, 5), (3, 2, 6, 4)]:
        dtype = torch.complex128 if layout == "complex" else torch.float64
        v = torch.randn(shape, dtype=dtype, requires_grad=True)
        ours = torch.autograd.grad(compiled(v), v)
        torch.testing.assert_close(ours, torch.autograd.grad(step(v), v))


@pytest.mark.parametrize("derivative", ["cg", "jvp"])
@pytest.mark.parametrize("channels", [16, 64])
def test_saves_the_matrix_and_its_polar_factor_alone(channels, derivative):
    v = torch.randn(10, 2, channels, channels, requires_grad=True)
    with saved_tensors() as saved:
        w = polar(v, planar=True, derivative=derivative)
    kept = {t.data_ptr(): t.nbytes for t in saved}
    assert kept.pop(v.data_ptr()) == v.nbytes
    assert kept == ({w.data_ptr(): w.nbytes} if derivative == "cg" else {})


def flops(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("planes", "product"), [(1, 2), (2, 8)])
def test_work(planes, product):
    m, steps = 24, 8
    x = torch.randn(3, planes, m, m)
    unit = 3 * product * m**3
    table = coefficients("535nn")
    assert flops(lambda: polar_gemm.polar_forward(x, table)) == 12 * unit
    w, _ = polar_gemm.polar_forward(x, table)
    assert flops(lambda: polar_gemm.polar_backward(x, x, w, steps)) == (steps + 3) * unit
    assert flops(lambda: polar_gemm.polar_jvp(x, x, table)) == 28 * unit


@pytest.mark.parametrize("derivative", ["cg", "jvp"])
def test_is_deterministic(derivative):
    v = torch.randn(50, 2, 32, 32, requires_grad=True)
    grad = torch.randn_like(v)
    runs = []
    for _ in range(3):
        w, residual = polar(v, planar=True, derivative=derivative, return_residual=True)
        runs.append((w, residual, *torch.autograd.grad(w, v, grad)))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2), (2, 2, 3, 3), (1, 2, 2, 4)])
@pytest.mark.parametrize("derivative", ["cg", "jvp"])
def test_second_derivative(shape, derivative):
    torch.manual_seed(0)
    v = 0.3 * torch.randn(shape, dtype=torch.float64)
    planar = v.dim() == 4
    (v[:, 0] if planar else v).diagonal(dim1=-2, dim2=-1).add_(1)
    v.requires_grad_()

    def function(v):
        return polar(v, planar=planar, derivative=derivative)

    # "jvp" holds the normaliser constant, on which the schedule's map hardly depends
    assert torch.autograd.gradgradcheck(function, v, atol=1e-4, rtol=1e-4)
    plain, again = (
        torch.autograd.grad(function(v).cos().sum(), v, create_graph=graph)[0]
        for graph in (False, True)
    )
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-8)


def test_second_derivative_by_the_registered_op():
    v = (torch.eye(3) + 0.1 * torch.randn(3, 3)).double()[None, None].requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda v: torch.ops.lipfast.polar(v, "535nn", "cg", 40, "torch")[0], v
    )


def test_chooses_the_fast_path_and_obeys():
    v = torch.randn(4, 5)
    assert backends.choose("polar", v) == "torch"
    published = polar(v, ridge=0.1, backend="reference")
    with lipfast.backend("reference"):
        assert torch.equal(polar(v, ridge=0.1), published)
    assert not torch.equal(polar(v, ridge=0.1), published)


def test_more_steps_come_closer():
    v = torch.randn(4, 12, 12, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(v)
    exact = torch.autograd.grad(polar(v, schedule="55555nn", steps=200), v, grad)[0]
    errors = []
    for steps in (4, 8, 16):
        (ours,) = torch.autograd.grad(polar(v, schedule="55555nn", steps=steps), v, grad)
        errors.append((ours - exact).norm().item())
    assert errors[0] > errors[1] > errors[2]


def one(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD_INPUTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: polar([[1.0]]), TypeError, "matrix must be a torch.Tensor, got list"),
    (lambda: polar(one(2, 2, dtype=torch.int64)), TypeError, "matrix .* got torch.int64"),
    (
        lambda: polar(one(2, 2, 2, dtype=torch.complex64), planar=True),
        TypeError,
        "with planar=True, got torch.complex64",
    ),
    (lambda: polar(one(4)), ValueError, r"matrix must have the shape \(\.\.\., m, n\), got \(4,\)"),
    (lambda: polar(one(2, 2), planar=True), ValueError, r"\(\.\.\., 2, m, n\), got \(2, 2\)"),
    (lambda: polar(one(3, 2, 2), planar=True), ValueError, r"got \(3, 2, 2\)"),
    (lambda: polar(one(2, 2), ridge=-1.0), ValueError, "ridge must be finite and at least 0"),
    (lambda: polar(one(2, 2), ridge=float("nan")), ValueError, "ridge must be finite"),
    (lambda: polar(one(2, 2), ridge="1"), TypeError, "ridge must be a number or a tensor, got str"),
    (lambda: polar(one(2, 2), ridge=one(2)), ValueError, r"ridge must be .* of shape \(2,\)"),
    (
        lambda: polar(one(2, 2), ridge=torch.ones((), device="meta")),
        ValueError,
        "ridge must be on the device cpu of matrix, got meta",
    ),
    (
        lambda: polar(one(2, 2), ridge=1e-4, form="bjorck"),
        ValueError,
        "ridge must be 0 with form 'bjorck', got 0.0001",
    ),
    (lambda: polar(one(2, 2), schedule="nn"), ValueError, "schedule must be one of 55n, .* 'nn'"),
    (lambda: polar(one(2, 2), derivative="x"), ValueError, "derivative must be one of cg, jvp"),
    (lambda: polar(one(2, 2), form="x"), ValueError, "form must be one of newton, bjorck"),
    (lambda: polar(one(2, 2), steps=0), ValueError, "steps must be a positive int or None, got 0"),
    (lambda: polar(one(2, 2), steps=2.0), ValueError, "steps must be a positive int"),
    (lambda: polar(one(2, 2), backend="cpp"), ValueError, "has only the backends"),
    (lambda: polar(one(2, 2), backend="cuda"), ValueError, "backend 'cuda' cannot run"),
    (
        lambda: polar(one(2, 2, dtype=torch.complex128), backend="triton"),
        ValueError,
        "it computes in float32, and matrix has complex128",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_INPUTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
