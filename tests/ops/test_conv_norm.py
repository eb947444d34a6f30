"""conv_norm: values and derivatives, against the dense operator in float64."""

import math

import pytest
import torch
from torch import Tensor

from lipfast.ops import conv_norm
from lipfast.reference import conv2d_same, skew_kernel

F64 = torch.float64
BACKENDS = ["torch", "reference"]
MODES = ["zeros", "circular"]
# kernel and map: odd ones, kernels larger than the map, out != in
CASES = [
    ((1, 1, 1, 1), (1, 1)),
    ((4, 3, 1, 1), (2, 5)),
    ((3, 5, 3, 3), (6, 7)),
    ((5, 3, 3, 5), (1, 2)),
    ((2, 2, 7, 3), (2, 4)),
    ((3, 2, 5, 5), (9, 9)),
]


def dense(kernel: Tensor, size: tuple[int, int], padding_mode: str) -> Tensor:
    """The matrix of the convolution, differentiable in the kernel."""
    n = kernel.shape[1] * math.prod(size)
    basis = torch.eye(n, dtype=kernel.dtype).reshape(n, kernel.shape[1], *size)
    return conv2d_same(basis, kernel, None, padding_mode).flatten(1).T


def draw(shape: tuple[int, ...], size: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(shape, dtype=F64, generator=generator)
    batch = shape[0] if len(shape) == 5 else 1
    return kernel, torch.randn(batch, shape[-3], *size, dtype=F64, generator=generator)


def power_step(matrix: Tensor, vector: Tensor) -> Tensor:
    image = matrix.T @ (matrix @ vector)
    return image / image.norm()


def plane_step(matrix: Tensor, vector: Tensor) -> Tensor:
    """The unit vector with the longest image in the span of v and W^T W v, by an SVD."""
    plane = torch.stack([vector / vector.norm(), power_step(matrix, vector)], dim=1)
    plane = torch.linalg.svd(plane, full_matrices=False)
    basis = plane.U[:, plane.S > 1e-10]
    return basis @ torch.linalg.svd(matrix @ basis).Vh[0]


DEFINITIONS = {"torch": plane_step, "reference": power_step}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize(("shape", "size"), CASES)
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_the_iteration_of_the_dense_operator(
    shape, size, padding_mode, steps, backend, poisoned_empty
):
    kernel, vector = draw(shape, size)
    kernel.requires_grad_()
    matrix = dense(kernel, size, padding_mode)
    expected = vector.flatten()
    for _ in range(steps):
        expected = DEFINITIONS[backend](matrix.detach(), expected)
    norm, new = conv_norm(kernel, vector, padding_mode, steps=steps, backend=backend)
    expected = expected * (expected @ new.flatten()).sign()
    true = (matrix @ expected).norm()
    torch.testing.assert_close(norm, true, rtol=1e-12, atol=0)
    torch.testing.assert_close(new.flatten(), expected, rtol=1e-9, atol=1e-9)
    assert not new.requires_grad
    ours, theirs = (torch.autograd.grad(value, kernel) for value in (norm, true))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_converges_to_the_norm_from_below(skew, padding_mode, k):
    kernel, vector = draw((4, 4, k, k), (5, 6))
    kernel = skew_kernel(kernel) if skew else kernel
    true = torch.linalg.matrix_norm(dense(kernel, (5, 6), padding_mode), 2)
    before = torch.zeros(())
    for _ in range(40):
        norm, vector = conv_norm(kernel, vector, padding_mode, steps=100)
        assert before * (1 - 1e-12) <= norm <= true * (1 + 1e-12)
        before = norm
    assert norm >= true * (1 - 1e-4)


@pytest.mark.parametrize("padding_mode", MODES)
def test_gradient_at_convergence_is_that_of_the_norm(padding_mode):
    kernel, vector = draw((3, 3, 3, 3), (4, 5))
    kernel.requires_grad_()
    norm, _ = conv_norm(kernel, vector, padding_mode, steps=3000)
    true = torch.linalg.matrix_norm(dense(kernel, (4, 5), padding_mode), 2)
    ours, theirs = (torch.autograd.grad(value, kernel)[0] for value in (norm, true))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("shape", [(3, 4, 2, 3, 3), (2, 3, 3, 1, 1), (1, 2, 2, 3, 1)])
def test_a_batch_is_as_many_single_calls(shape, padding_mode, backend, poisoned_empty):
    kernels, vectors = draw(shape, (4, 3))
    kernels.requires_grad_()
    weights = torch.randn(len(kernels), dtype=F64)
    norms, new = conv_norm(kernels, vectors, padding_mode, steps=2, backend=backend)
    pairs = [
        conv_norm(kernel, vector[None], padding_mode, steps=2, backend=backend)
        for kernel, vector in zip(kernels, vectors, strict=True)
    ]
    single = torch.stack([norm for norm, _ in pairs])
    torch.testing.assert_close(norms, single)
    torch.testing.assert_close(new, torch.cat([vector for _, vector in pairs]))
    ours, theirs = (torch.autograd.grad(value @ weights, kernels) for value in (norms, single))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("shape", [(8, 8, 3, 3), (17, 16, 3, 3), (3, 12, 12, 3, 3), (64, 64, 1, 1)])
def test_float32_is_as_exact_as_the_published_form(shape, padding_mode):
    kernel, vector = draw(shape, (9, 9))
    kernel.requires_grad_()
    errors = {}
    for backend in BACKENDS:
        exact, exact_vector = conv_norm(kernel, vector, padding_mode, backend=backend)
        (exact_grad,) = torch.autograd.grad(exact.sum(), kernel)
        narrow = kernel.detach().float().requires_grad_()
        norm, new = conv_norm(narrow, vector.float(), padding_mode, backend=backend)
        (grad,) = torch.autograd.grad(norm.sum(), narrow)
        pairs = ((norm, exact), (new, exact_vector), (grad, exact_grad))
        errors[backend] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    for ours, published in zip(errors["torch"], errors["reference"], strict=True):
        assert ours < 2 * published + 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("padding_mode", MODES)
def test_tiny_and_huge_kernels(scale, padding_mode):
    kernel, vector = (t.float() for t in draw((4, 4, 3, 3), (5, 5)))
    kernel.requires_grad_()
    scaled = (kernel.detach() * scale).requires_grad_()
    one, first = conv_norm(kernel, vector, padding_mode)
    other, second = conv_norm(scaled, vector * 1e-20, padding_mode)
    torch.testing.assert_close(other / scale, one)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(torch.autograd.grad(other, scaled), torch.autograd.grad(one, kernel))


@pytest.mark.parametrize("padding_mode", MODES)
def test_zero_kernels_and_vectors_without_a_value(padding_mode):
    kernel, vector = draw((3, 2, 3, 3), (4, 4))
    zero = torch.zeros_like(kernel).requires_grad_()
    norm, new = conv_norm(zero, vector, padding_mode)
    assert norm == 0
    assert not torch.autograd.grad(norm, zero)[0].any()
    assert new.norm().item() == pytest.approx(1)
    _, fixed = conv_norm(kernel, torch.zeros_like(vector), padding_mode)
    for value in (0.0, math.nan, math.inf):
        norm, again = conv_norm(kernel, torch.full_like(vector, value), padding_mode)
        assert norm > 0
        assert torch.equal(again, fixed)
    kernel[0, 0, 1, 1] = math.nan
    norm, again = conv_norm(kernel, vector, padding_mode)
    assert norm.isnan()
    assert again.norm().item() == pytest.approx(1)  # the state recovers


def test_leaves_the_kernel_of_the_convolution():
    """A vector that is mapped to 0 has no ascent direction of its own."""
    kernel = torch.zeros(1, 2, 1, 1, dtype=F64)
    kernel[0, 0] = 1
    vector = torch.tensor([0.0, 1.0], dtype=F64).view(1, 2, 1, 1)
    norm, new = conv_norm(kernel, vector, "zeros")
    assert norm.item() == pytest.approx(1)
    torch.testing.assert_close(new.abs().flatten(), torch.tensor([1.0, 0.0], dtype=F64))


def test_is_nearer_than_the_power_iteration_after_as_many_steps():
    for seed in range(5):
        kernel, vector = draw((8, 8, 3, 3), (6, 6), seed)
        true = torch.linalg.matrix_norm(dense(kernel, (6, 6), "zeros"), 2)
        ours, _ = conv_norm(kernel, vector, "zeros", steps=20)
        theirs, _ = conv_norm(kernel, vector, "zeros", steps=20, backend="reference")
        assert true - ours <= 0.7 * (true - theirs)


@pytest.mark.parametrize("padding_mode", MODES)
def test_gradcheck(padding_mode):
    """With the vector that the gradient holds constant: an iteration does not move it."""
    for shape, size in (((3, 2, 3, 3), (3, 4)), ((2, 2, 2, 1, 1), (2, 2)), ((2, 2, 9, 1), (3, 1))):
        kernel, vector = draw(shape, size)
        _, fixed = conv_norm(kernel, vector, padding_mode, steps=5000)

        def norm(kernel: Tensor, fixed: Tensor = fixed) -> Tensor:
            return conv_norm(kernel, fixed, padding_mode)[0]

        assert torch.autograd.gradcheck(norm, kernel.requires_grad_(), rtol=1e-5)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 2, 3, 3, 3)])
def test_second_derivative_at_a_fixed_vector(padding_mode, shape):
    kernel, vector = draw(shape, (4, 4))
    norm, new = conv_norm(kernel.requires_grad_(), vector, padding_mode)
    (plain,) = torch.autograd.grad(norm.square().sum(), kernel, retain_graph=True)
    (first,) = torch.autograd.grad(norm.square().sum(), kernel, create_graph=True)
    torch.testing.assert_close(first, plain)
    direction = torch.randn_like(kernel)
    (ours,) = torch.autograd.grad((first * direction).sum(), kernel)

    def squares(kernel: Tensor) -> Tensor:
        """|W v|^2 for every kernel, at v = `new`."""
        pad = (1, 1, 1, 1)
        mode = "constant" if padding_mode == "zeros" else "circular"
        padded = torch.nn.functional.pad(new, pad, mode=mode)
        kernels = kernel if kernel.dim() == 5 else kernel[None]
        pairs = zip(padded, kernels, strict=True)
        images = [torch.nn.functional.conv2d(v[None], k).square().sum() for v, k in pairs]
        return torch.stack(images).sum()

    (expected,) = torch.autograd.grad(squares(kernel), kernel, create_graph=True)
    torch.testing.assert_close(first, expected)
    (expected,) = torch.autograd.grad((expected * direction).sum(), kernel)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_computed_in_float32(dtype):
    kernel, vector = (t.to(dtype) for t in draw((3, 4, 3, 3), (4, 4)))
    norm, new = conv_norm(kernel.requires_grad_(), vector, "zeros")
    assert norm.dtype == new.dtype == dtype
    wide, _ = conv_norm(kernel.float(), vector.float(), "zeros")
    assert torch.equal(norm, wide.to(dtype))
    assert torch.autograd.grad(norm, kernel)[0].dtype == dtype


def test_autocast_does_not_round_the_kernel():
    kernel, vector = (t.float() for t in draw((16, 16, 3, 3), (8, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        norm, _ = conv_norm(kernel, vector, "zeros")
    assert torch.equal(norm, conv_norm(kernel, vector, "zeros")[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format(memory_format):
    kernel, vector = draw((4, 4, 3, 3), (5, 6))
    other = kernel.to(memory_format=memory_format).requires_grad_()
    norm, new = conv_norm(other, vector.to(memory_format=memory_format), "zeros")
    strided, _ = conv_norm(kernel.mT.contiguous().mT, vector.flip(0), "zeros")
    expected, expected_new = conv_norm(kernel.requires_grad_(), vector, "zeros")
    torch.testing.assert_close((norm, strided), (expected, expected))
    torch.testing.assert_close(new, expected_new)
    torch.testing.assert_close(
        torch.autograd.grad(norm, other), torch.autograd.grad(expected, kernel)
    )


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (3, 0, 3, 3), (0, 2, 2, 3, 3), (2, 0, 2, 1, 1)])
def test_no_channels_or_kernels(shape):
    kernel, vector = draw(shape, (4, 4))
    norm, new = conv_norm(kernel.requires_grad_(), vector, "zeros")
    assert norm.shape == (shape[:1] if len(shape) == 5 else ())
    assert not norm.any()
    assert new.shape == vector.shape
    assert not torch.autograd.grad(norm.sum(), kernel)[0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("padding_mode", MODES)
@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (3, 8, 8, 3, 3), (32, 32, 1, 1)])
def test_gpu_equals_cpu(shape, padding_mode):
    kernel, vector = draw(shape, (9, 7))
    norm, new = conv_norm(kernel.requires_grad_(), vector, padding_mode, steps=2)
    (grad,) = torch.autograd.grad(norm.sum(), kernel)
    other = kernel.detach().cuda().requires_grad_()
    gpu_norm, gpu_new = conv_norm(other, vector.cuda(), padding_mode, steps=2)
    (gpu_grad,) = torch.autograd.grad(gpu_norm.sum(), other)
    torch.testing.assert_close(gpu_norm.cpu(), norm)
    torch.testing.assert_close(gpu_new.cpu(), new)
    torch.testing.assert_close(gpu_grad.cpu(), grad)
