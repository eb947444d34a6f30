"""conv_norm_bound: above the norm on every map, exact derivatives, registration, refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from adversarial import FAMILIES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lipfast
from lipfast import backends, reference
from lipfast.ops import conv_norm_bound
from lipfast.ops.conv_norm_schatten import schatten_norm
from lipfast.saved import saved_tensors

F64 = torch.float64
METHODS = ["unfolding", "frequency", "gram"]
BACKENDS = ["torch", "reference"]
SHAPES = [(1, 1, 1, 1), (3, 4, 3, 3), (4, 2, 1, 1), (2, 3, 1, 5), (3, 2, 7, 3), (2, 2, 5, 5)]
LIMITS = {"unfolding": 3.0, "frequency": 1.25, "gram": 5.0}  # times the norm, random 3x3 kernels


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator)


def dense_norm(kernel: Tensor, size: tuple[int, int], padding_mode: str) -> Tensor:
    n = kernel.shape[1] * math.prod(size)
    basis = torch.eye(n, dtype=F64).reshape(n, kernel.shape[1], *size)
    dense = reference.conv2d_same(basis, kernel, None, padding_mode).flatten(1)
    return torch.linalg.matrix_norm(dense, 2)


def singular_values(matrix: Tensor, planar: bool) -> Tensor:
    if planar:
        matrix = torch.complex(*matrix.unbind(-3))
    return torch.linalg.svdvals(matrix)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_above_the_norm_on_every_map(family, method):
    for seed, shape in enumerate(SHAPES):
        kernel = FAMILIES[family](shape, torch.Generator().manual_seed(seed))
        bound = conv_norm_bound(kernel, method=method) * (1 + 1e-12)
        for size in ((1, 1), (3, 4), (6, 5)):
            for padding_mode in ("zeros", "circular"):
                assert dense_norm(kernel, size, padding_mode) <= bound


@pytest.mark.parametrize("method", METHODS)
def test_is_as_tight_as_the_method_promises(method):
    for seed in range(4):
        kernel = draw((8, 8, 3, 3), seed)
        norm = dense_norm(kernel, (9, 9), "circular")
        assert conv_norm_bound(kernel, method=method) <= LIMITS[method] * norm
    matrix = draw((8, 8, 1, 1))
    exact = torch.linalg.matrix_norm(matrix[:, :, 0, 0], 2)
    if method != "gram":
        assert conv_norm_bound(matrix, method=method) <= 8 ** (1 / 32) * exact


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (6, 2, 3), (1, 7)])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("squarings", [0, 1, 4, 7])
def test_schatten_norm_and_its_gradient(shape, planar, squarings):
    shape = (*shape[:-2], 2, *shape[-2:]) if planar else shape
    matrix = draw(shape).requires_grad_()
    p = 2 ** (squarings + 1)
    expected = torch.linalg.vector_norm(singular_values(matrix, planar), p, dim=-1)
    ours = schatten_norm(matrix, squarings, planar=planar)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    weights = draw(ours.shape, 1)
    grads = [torch.autograd.grad((v * weights).sum(), matrix) for v in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(lambda m: schatten_norm(m, squarings, planar=planar), matrix)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (3, 2, 1, 1), (2, 2, 1, 3), (2, 2, 2, 3, 1)])
def test_gradcheck(shape, method):
    kernel = draw(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: conv_norm_bound(k, method=method), kernel)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 3, 3, 3), (2, 3, 2, 1, 1)])
def test_equals_the_published_form(shape, method, poisoned_empty):
    kernel = draw(shape).requires_grad_()
    ours, published = (conv_norm_bound(kernel, method=method, backend=b) for b in BACKENDS)
    torch.testing.assert_close(ours, published, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(v.sum(), kernel) for v in (ours, published)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_unfoldings_are_enough_for_skew_kernels(backend):
    kernel = reference.skew_kernel(draw((5, 5, 3, 3)))
    four = conv_norm_bound(kernel, backend=backend)
    torch.testing.assert_close(conv_norm_bound(kernel, skew=True, backend=backend), four)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [8, 40])
def test_float32_is_as_exact_as_the_published_form(method, channels):
    kernel = draw((channels, channels, 3, 3)).requires_grad_()
    exact = conv_norm_bound(kernel, method=method)
    (exact_grad,) = torch.autograd.grad(exact, kernel)
    errors = {}
    for backend in BACKENDS:
        narrow = kernel.detach().float().requires_grad_()
        bound = conv_norm_bound(narrow, method=method, backend=backend)
        (grad,) = torch.autograd.grad(bound, narrow)
        pairs = ((bound, exact), (grad, exact_grad))
        errors[backend] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    for ours, published in zip(errors["torch"], errors["reference"], strict=True):
        assert ours < 2 * published + 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_tiny_and_huge_kernels(method, scale):
    kernel = draw((4, 3, 3, 3)).float().requires_grad_()
    scaled = (kernel.detach() * scale).requires_grad_()
    one, other = (conv_norm_bound(k, method=method) for k in (kernel, scaled))
    torch.testing.assert_close(other / scale, one)
    grads = [torch.autograd.grad(v, k)[0] for v, k in ((other, scaled), (one, kernel))]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_without_a_norm(method, backend):
    kernels = torch.stack([torch.zeros(3, 3, 3, 3), draw((3, 3, 3, 3)).float()]).requires_grad_()
    bounds = conv_norm_bound(kernels, method=method, backend=backend)
    assert bounds[0] == 0 < bounds[1]
    if backend == "torch":
        (grad,) = torch.autograd.grad(bounds.sum(), kernels)
        assert not grad[0].any()
        assert grad[1].isfinite().all()
    for value in (math.nan, math.inf):
        assert conv_norm_bound(kernels.detach() + value, method=method).isnan().all()
    assert conv_norm_bound(torch.zeros(0, 2, 2, 3, 3), method=method).shape == (0,)
    assert conv_norm_bound(torch.zeros(0, 2, 3, 3), method=method) == 0


@pytest.mark.parametrize("method", ["unfolding", "frequency", "gram"])
def test_second_derivative(method):
    kernel = draw((3, 2, 3, 3)).requires_grad_()
    function = lambda k: conv_norm_bound(k, method=method)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, kernel, fast_mode=True)
    (plain,) = torch.autograd.grad(function(kernel), kernel)
    (again,) = torch.autograd.grad(function(kernel), kernel, create_graph=True)
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("planar", [False, True])
def test_registration(planar):
    op = torch.ops.lipfast.schatten_norm.default
    backward = torch.ops.lipfast.schatten_norm_backward.default
    for shape in ((3, 4), (3, 5, 3)):
        matrix = draw((*shape[:-2], 2, *shape[-2:]) if planar else shape)
        bound = op(matrix, planar, 3)
        torch.library.opcheck(op, (matrix.requires_grad_(), planar, 3))
        grad = torch.ones_like(bound)
        torch.library.opcheck(backward, (grad, matrix.detach(), bound, planar, 3))


def test_saves_the_matrices_and_not_their_powers():
    matrix = draw((6, 8, 8)).requires_grad_()
    with saved_tensors() as saved:
        schatten_norm(matrix, 5)
    assert sum(t.numel() for t in saved) == 6 * 8 * 8 + 6


@pytest.mark.parametrize("method", METHODS)
def test_is_one_graph_and_runs_on_fake_tensors(method):
    kernel = draw((2, 4, 4, 3, 3)).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda k: conv_norm_bound(k, method=method).sum(), fullgraph=True, backend="aot_eager"
    )
    ours, expected = (
        f(kernel) for f in (compiled, lambda k: conv_norm_bound(k, method=method).sum())
    )
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, kernel), torch.autograd.grad(expected, kernel)
    )
    with FakeTensorMode():
        bound = conv_norm_bound(torch.empty(2, 3, 3, 3, dtype=torch.bfloat16), method=method)
        assert (bound.shape, bound.dtype) == ((), torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_is_deterministic_and_ignores_memory_formats_and_autocast(method):
    kernel = draw((8, 8, 3, 3)).float()
    bound = conv_norm_bound(kernel, method=method)
    assert torch.equal(bound, conv_norm_bound(kernel, method=method))
    other = conv_norm_bound(kernel.to(memory_format=torch.channels_last), method=method)
    torch.testing.assert_close(other, bound)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv_norm_bound(kernel, method=method), bound)


def test_chooses_the_op_and_leaves_transforms_to_the_published_form():
    kernel = draw((3, 3, 3, 3))
    assert backends.choose("conv_norm_bound", kernel) == "torch"
    with lipfast.backend("reference"):
        torch.testing.assert_close(
            conv_norm_bound(kernel), conv_norm_bound(kernel, backend="torch")
        )
    grad = torch.func.grad(conv_norm_bound)(kernel)
    kernel.requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(conv_norm_bound(kernel), kernel)[0])


K = torch.ones(2, 2, 3, 3)
BAD_INPUTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: conv_norm_bound([1.0]), TypeError, "kernel must be a torch.Tensor, got list"),
    (lambda: conv_norm_bound(K.int()), TypeError, "dtype of kernel .* got torch.int32"),
    (lambda: conv_norm_bound(K[0]), ValueError, r"kernel must have .* got \(2, 3, 3\)"),
    (lambda: conv_norm_bound(K[..., :2]), ValueError, r"odd kh and kw.* got \(2, 2, 3, 2\)"),
    (lambda: conv_norm_bound(K, method="exact"), ValueError, "method must be .* got 'exact'"),
    (lambda: conv_norm_bound(K, backend="cuda"), ValueError, "has only the backends"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_INPUTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
