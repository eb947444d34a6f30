"""cayley: values and derivatives, against the definition in float64."""

import pytest
import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import cayley

ABSENT = backends.why_not("cayley", "cpp", torch.empty(1, 1))
CPP = pytest.param("cpp", marks=pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT)))
FAST = [CPP, "torch"]
KINDS = ["real", "complex", "planar"]
SHAPES = [(1, 1), (2, 2), (5, 5), (3, 16, 16), (2, 3, 17, 17), (7, 4), (3, 4, 7), (2, 9, 1), (1, 6)]


def definition(matrix: Tensor) -> Tensor:
    """[(I - A) (I + A)^(-1); -2 V (I + A)^(-1)]; differentiable."""
    m, n = matrix.shape[-2:]
    if n > m:
        return definition(matrix.mH).mH
    u, v = matrix[..., :n, :], matrix[..., n:, :]
    a = u - u.mH + v.mH @ v
    identity = torch.eye(n, dtype=matrix.dtype)
    inverse = torch.linalg.solve(identity + a, identity)
    return torch.cat([(identity - a) @ inverse, -2 * v @ inverse], dim=-2)


def draw(shape: tuple[int, ...], kind: str, *, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Matrix, which requires gradients, and dL/dW, in double precision."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if kind == "real" else torch.complex128
    matrix, grad = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
    return (matrix * size).requires_grad_(), grad


def split(matrix: Tensor) -> Tensor:
    return torch.stack([matrix.real, matrix.imag], dim=-3)


def join(parts: Tensor) -> Tensor:
    return torch.complex(parts[..., 0, :, :], parts[..., 1, :, :])


def run(matrix: Tensor, kind: str, backend: str | None = None) -> Tensor:
    if kind == "planar":
        return join(cayley(split(matrix), planar=True, backend=backend))
    return cayley(matrix, backend=backend)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, kind, backend, poisoned_empty):
    matrix, grad = draw(shape, kind)
    expected = definition(matrix)
    out = run(matrix, kind, backend)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out, matrix, grad)
    theirs = torch.autograd.grad(expected, matrix, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 3), (2, 4, 2), (2, 3), (1, 1)])
@pytest.mark.parametrize("backend", FAST)
def test_gradcheck(backend, shape, kind):
    matrix, _ = draw(shape, kind)
    if kind == "planar":
        parts = split(matrix).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda p: cayley(p, planar=True, backend=backend), parts)
    else:
        assert torch.autograd.gradcheck(lambda m: cayley(m, backend=backend), matrix)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (2, 3, 3)])
@pytest.mark.parametrize("kind", ["real", "planar"])
@pytest.mark.parametrize("registered", [False, True])
def test_second_derivative(shape, kind, registered):
    matrix, _ = draw(shape, kind)
    planar = kind == "planar"
    if planar:
        matrix = split(matrix)
    matrix = matrix.detach().requires_grad_()

    def function(m):
        return (
            torch.ops.lipfast.cayley(m, planar, "torch") if registered else cayley(m, planar=planar)
        )

    assert torch.autograd.gradgradcheck(function, matrix)
    plain, again = (
        torch.autograd.grad(function(matrix).cos().sum(), matrix, create_graph=graph)[0]
        for graph in (False, True)
    )
    torch.testing.assert_close(again, plain)


def defect(matrix: Tensor) -> float:
    """The largest distance of a Gram matrix from the identity, in the spectral norm."""
    matrix = matrix.detach().to(torch.complex128)
    matrix = matrix.mH if matrix.shape[-1] > matrix.shape[-2] else matrix
    gram = matrix.mH @ matrix
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    return torch.linalg.matrix_norm(gram - identity, ord=2).max().item()


@pytest.mark.parametrize("shape", [(20, 16, 16), (8, 64, 64), (4, 128, 128), (4, 48, 32)])
@pytest.mark.parametrize("kind", ["real", "planar"])
@pytest.mark.parametrize("backend", FAST)
def test_float32_is_orthogonal_and_as_exact_as_the_published_form(backend, shape, kind):
    matrix, grad = draw(shape, kind)
    matrix = matrix.detach()
    matrix = (matrix / torch.linalg.matrix_norm(matrix, ord=2).max()).requires_grad_()  # |A| to 2
    exact = definition(matrix)
    (exact_grad,) = torch.autograd.grad(exact, matrix, grad)
    errors: dict[str, list[float]] = {}
    for name in (backend, "reference"):
        rough = matrix.detach().to(torch.float32 if kind == "real" else torch.complex64)
        rough.requires_grad_()
        out = run(rough, kind, name)
        (gradient,) = torch.autograd.grad(out, rough, grad.to(out.dtype))
        errors[name] = [defect(out)]
        for value, truth in ((out, exact), (gradient, exact_grad)):
            distance = (value.detach() - truth.detach()).norm() / truth.detach().norm()
            errors[name].append(distance.item())
    for ours, published in zip(*errors.values(), strict=True):
        assert ours < 2 * published + 1e-6


@pytest.mark.parametrize("kind", ["real", "planar"])
@pytest.mark.parametrize("size", [1e-20, 10.0, 1e3])
@pytest.mark.parametrize("backend", FAST)
def test_small_and_large_matrices(backend, size, kind):
    matrix, grad = draw((4, 24, 24), kind, size=size)
    rough = matrix.detach().to(torch.float32 if kind == "real" else torch.complex64)
    rough.requires_grad_()
    out = run(rough, kind, backend)
    (gradient,) = torch.autograd.grad(out, rough, grad.to(out.dtype))
    assert gradient.isfinite().all()
    # backward stable elimination: an error of eps |A| in I + A, |Z| <= 1
    norm = torch.linalg.matrix_norm(matrix.detach(), ord=2).max().item()
    error = torch.linalg.matrix_norm(out - definition(matrix), ord=2).max().item()
    assert error < 24 * 2**-24 * (1 + 2 * norm)


def test_leading_dimensions_and_strides():
    matrix, grad = draw((2, 3, 5, 5), "planar")
    parts = split(matrix).detach()
    turned = parts.transpose(0, 1).contiguous().transpose(0, 1).mT.contiguous().mT.requires_grad_()
    assert not turned.is_contiguous()
    out = cayley(turned, planar=True)
    assert out.is_contiguous()
    expected = definition(matrix)
    torch.testing.assert_close(join(out), expected)
    late = split(grad).mT.contiguous().mT
    ours = join(torch.autograd.grad(out, turned, late)[0])
    torch.testing.assert_close(ours, torch.autograd.grad(expected, matrix, grad)[0])


@pytest.mark.parametrize(
    "shape", [(0, 4, 4), (3, 0, 0), (3, 0, 4), (3, 4, 0), (0, 2, 5), (0, 5, 2)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_do(shape, kind, poisoned_empty):
    matrix, grad = draw(shape, kind)
    out = run(matrix, kind)
    assert out.shape == shape
    assert torch.autograd.grad(out, matrix, grad)[0].shape == shape


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (15, 15)])
@pytest.mark.parametrize("backend", FAST)
def test_nan_spoils_its_own_matrix_only(backend, place, value):
    matrix = torch.randn(3, 2, 16, 16)
    matrix[(1, 0, *place)] = value
    matrix.requires_grad_()
    out = cayley(matrix, planar=True, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), matrix)
    for result in (out, grad):
        assert result[1].isnan().any()
        assert result[0].isfinite().all()
        assert result[2].isfinite().all()


def test_autocast_does_not_apply():
    matrix = torch.randn(2, 2, 16, 16).requires_grad_()
    plain = cayley(matrix, planar=True)
    (plain_grad,) = torch.autograd.grad(plain.sum(), matrix)
    with torch.autocast("cpu", torch.bfloat16):
        out = cayley(matrix, planar=True)
        assert torch.equal(out, plain)
        assert torch.equal(torch.autograd.grad(out.sum(), matrix)[0], plain_grad)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 64, 64), (6, 128, 128)])
def test_gpu_equals_the_definition(shape, kind, poisoned_empty):
    matrix, grad = draw(shape, kind, size=0.1)
    expected = definition(matrix)
    (exact,) = torch.autograd.grad(expected, matrix, grad)
    on_gpu, late = matrix.detach().cuda().requires_grad_(), grad.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run(on_gpu, kind, "torch")
        (gradient,) = torch.autograd.grad(out, on_gpu, late)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient.cpu(), exact, rtol=1e-10, atol=1e-10)
