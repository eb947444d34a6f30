"""conv_norm: registration, memory, determinism, choice of backend, tracking, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lipfast
from lipfast import backends
from lipfast.ops import conv_norm
from lipfast.reference import conv2d_same
from lipfast.saved import saved_tensors

F64 = torch.float64
OP = torch.ops.lipfast.conv_norm.default
BACKWARD_OP = torch.ops.lipfast.conv_norm_backward.default


def draw(*shape: int, size: tuple[int, int] = (5, 4)) -> tuple[Tensor, Tensor]:
    kernel = torch.randn(shape, dtype=F64)
    batch = shape[0] if len(shape) == 5 else 1
    return kernel.requires_grad_(), torch.randn(batch, shape[-3], *size, dtype=F64)


@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (2, 3, 4, 3, 1), (4, 3, 1, 1), (0, 3, 3, 3, 3)])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_registration(shape, padding_mode):
    kernel, vector = draw(*shape)
    norm, new, image = (t.detach() for t in OP(kernel, vector, padding_mode, 2))
    # not the tests that differentiate all results: the vectors have no derivative
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OP, (kernel, vector, padding_mode, 2), test_utils=checks)
    grad = torch.ones(len(vector), dtype=F64) if kernel.dim() == 5 else norm.new_ones(())
    taps = list(shape[-2:])
    torch.library.opcheck(
        BACKWARD_OP, (grad, new, image, taps, padding_mode), test_utils=checks[:2]
    )


def test_fake_tensors_have_shape_and_dtype():
    with FakeTensorMode():
        kernel = torch.empty(3, 4, 4, 3, 3, dtype=torch.bfloat16, requires_grad=True)
        norm, new = conv_norm(kernel, torch.empty(3, 4, 8, 8, dtype=torch.bfloat16), "circular")
        assert (norm.shape, norm.dtype, new.shape) == ((3,), torch.bfloat16, (3, 4, 8, 8))
        assert torch.autograd.grad(norm.sum(), kernel)[0].shape == kernel.shape


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_step_is_one_graph(dynamic):
    def step(kernel: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        norm, new = conv_norm(kernel, vector, "zeros")
        return (kernel / norm).square().sum(), new

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for channels in (4, 5):
        kernel, vector = draw(3, channels, 3, 3)
        ours, new = compiled(kernel, vector)
        expected, expected_new = step(kernel, vector)
        torch.testing.assert_close(new, expected_new)
        torch.testing.assert_close(
            torch.autograd.grad(ours, kernel), torch.autograd.grad(expected, kernel)
        )


def test_saves_two_vectors_and_the_norm():
    kernel, vector = draw(6, 5, 3, 3)
    with saved_tensors() as saved:
        conv_norm(kernel, vector, "zeros")
    assert sorted(t.numel() for t in saved) == [1, 5 * 20, 6 * 20]


def test_is_deterministic():
    kernel, vector = draw(4, 16, 16, 3, 3)
    runs = []
    for _ in range(3):
        norm, new = conv_norm(kernel, vector, "zeros")
        runs.append((norm, new, torch.autograd.grad(norm.sum(), kernel)[0]))
    assert all(map(torch.equal, runs[0], runs[1]))
    assert all(map(torch.equal, runs[0], runs[2]))


def test_one_step_per_change_follows_the_norm():
    """As in training: the kernel drifts, the vector is that of the step before."""
    torch.manual_seed(0)
    kernel, vector = draw(6, 6, 3, 3, size=(6, 6))
    kernel, drift = kernel.detach(), torch.randn(6, 6, 3, 3, dtype=F64)
    basis = torch.eye(216, dtype=F64).reshape(216, 6, 6, 6)
    for step in range(200):
        kernel = kernel + 2e-3 * drift
        norm, vector = conv_norm(kernel, vector, "zeros")
        if step >= 100:
            dense = conv2d_same(basis, kernel, None, "zeros").flatten(1)
            assert norm >= 0.98 * torch.linalg.matrix_norm(dense, 2)
    _, cold = draw(6, 6, 3, 3, size=(6, 6))
    assert conv_norm(kernel, cold, "zeros")[0] < 0.9 * norm


def test_chooses_the_op_and_runs_inside_transforms():
    kernel, vector = draw(3, 3, 3, 3)
    assert backends.choose("conv_norm", kernel, vector) == "torch"
    with lipfast.backend("reference"):
        norm, _ = conv_norm(kernel, vector, "zeros")
    assert torch.equal(norm, conv_norm(kernel, vector, "zeros", backend="reference")[0])
    grad = torch.func.grad(lambda k: conv_norm(k, vector, "zeros")[0])(kernel.detach())
    expected = torch.autograd.grad(conv_norm(kernel, vector, "zeros")[0], kernel)[0]
    torch.testing.assert_close(grad, expected)
    kernels = torch.randn(2, 3, 3, 3, 3, dtype=F64)
    norms = torch.func.vmap(lambda k: conv_norm(k, vector, "zeros")[0])(kernels)
    both = conv_norm(kernels, vector.expand(2, -1, -1, -1), "zeros")[0]
    torch.testing.assert_close(norms, both)


def one(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


K, V = one(2, 3, 3, 3), one(1, 3, 4, 4)
BAD_INPUTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: conv_norm([1.0], V, "zeros"), TypeError, "kernel must be a torch.Tensor, got list"),
    (lambda: conv_norm(K, None, "zeros"), TypeError, "vector must be a torch.Tensor, got NoneType"),
    (lambda: conv_norm(K.int(), V, "zeros"), TypeError, "dtype of kernel .* got torch.int32"),
    (lambda: conv_norm(K, V.double(), "zeros"), TypeError, "vector must have the dtype torch.flo"),
    (lambda: conv_norm(K, V.to("meta"), "zeros"), ValueError, "vector must be on the device cpu"),
    (lambda: conv_norm(K[0], V, "zeros"), ValueError, r"kernel must have .* got \(3, 3, 3\)"),
    (lambda: conv_norm(one(2, 3, 2, 3), V, "zeros"), ValueError, "kernel must have .* odd kh"),
    (lambda: conv_norm(K, V[0], "zeros"), ValueError, r"vector must have the shape \(1, 3, h, w\)"),
    (lambda: conv_norm(K, one(2, 3, 4, 4), "zeros"), ValueError, r"got \(2, 3, 4, 4\)"),
    (lambda: conv_norm(K[None], one(2, 3, 4, 4), "zeros"), ValueError, r"shape \(1, 3, h, w\)"),
    (lambda: conv_norm(K, one(1, 3, 0, 4), "zeros"), ValueError, r"got \(1, 3, 0, 4\)"),
    (lambda: conv_norm(K, V, "reflect"), ValueError, "padding_mode .* got 'reflect'"),
    (lambda: conv_norm(K, V, "zeros", steps=0), ValueError, "steps must be .* got 0"),
    (lambda: conv_norm(K, V, "zeros", steps=1.5), ValueError, "steps must be .* got 1.5"),
    (lambda: conv_norm(K, V, "zeros", backend="cuda"), ValueError, "has only the backends"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_INPUTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
