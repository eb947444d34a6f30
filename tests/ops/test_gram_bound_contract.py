"""gram_bound: registration, work, memory, determinism, choice of backend, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lipfast
from lipfast import backends
from lipfast.ops import gram_bound, gram_bound_cpp, gram_bound_cuda, gram_bound_gemm
from lipfast.saved import saved_tensors

OP = torch.ops.lipfast.gram_bound.default
BACKWARD_OP = torch.ops.lipfast.gram_bound_backward.default
NO_CPP = backends.cpp_can_run(torch.empty(0)) is not None
CPP = pytest.param("cpp", marks=pytest.mark.skipif(NO_CPP, reason="lipfast._C is not built"))


def draw(shape: tuple[int, ...], axis: str = "in") -> tuple[Tensor, Tensor, Tensor]:
    """Weight, q and dL/dr in float64; weight and q require gradients."""
    weight = torch.randn(shape, dtype=torch.float64)
    first = len(shape) % 2
    rows = (*shape[:first], shape[first] if axis == "out" else shape[first + 1])
    q = torch.rand(rows, dtype=torch.float64) + 0.5
    return weight.requires_grad_(), q.requires_grad_(), torch.randn(rows, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (2, 3, 4, 2, 2), (4, 3), (0, 3, 3, 3)])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("backend", [CPP, "torch"])
def test_registration(shape, axis, backend):
    weight, q, grad = draw(shape, axis)
    torch.library.opcheck(OP, (weight, q, axis, 1, backend))
    torch.library.opcheck(OP, (weight.detach().float().requires_grad_(), None, axis, 1, backend))
    r, signs = (t.detach() for t in OP(weight, q, axis, 1, backend))
    arguments = (grad, weight.detach(), q.detach(), r, signs, axis, 1, backend)
    torch.library.opcheck(BACKWARD_OP, arguments)


def test_fake_tensors_have_shape_and_dtype():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for channels in (4, 400):
            r = gram_bound(torch.empty(2, 5, channels, 3, 3, dtype=torch.bfloat16), groups=5)
            assert (r.shape, r.dtype) == ((2, 5 * channels), torch.bfloat16)
        r, signs = OP(torch.empty(5, 4, 3, 3, device="cuda"), None, "out", 1, "triton")
        assert (r.device.type, r.shape, signs.shape) == ("cuda", (5,), (1, 5, 13, 5))
        assert signs.dtype == torch.int8


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_step_is_one_graph(dynamic):
    def step(weight: Tensor, q: Tensor) -> Tensor:
        return (weight * gram_bound(weight, q)[:, None, None] ** -0.5).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for channels in (4, 5):
        weight, q, _ = draw((3, channels, 3, 3), "in")
        ours = torch.autograd.grad(compiled(weight, q), (weight, q))
        torch.testing.assert_close(ours, torch.autograd.grad(step(weight, q), (weight, q)))


@pytest.mark.parametrize("channels", [16, 64])
def test_saves_one_byte_per_offset_and_pair(channels):
    weight, q = torch.randn(channels, channels, 3, 3).requires_grad_(), torch.rand(channels)
    with saved_tensors() as saved:
        gram_bound(weight, q)
    extra = sum(t.nbytes for t in saved if t.data_ptr() != weight.data_ptr())
    assert extra == 13 * channels**2 + 2 * 4 * channels  # signs, q and r


class CountProducts(TorchDispatchMode):
    """Counts the multiply-adds of matrix products and convolutions."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("addmm_", "addmm", "mm", "bmm", "baddbmm", "mv"):
            left = args[1] if name.startswith(("addmm", "baddbmm")) else args[0]
            self.total += out.numel() * left.shape[-1]
        assert "conv" not in name
        return out


def test_work_of_forward_and_backward():
    channels = 96
    taps = torch.randn(1, 3, 3, channels, channels)
    with CountProducts() as count:
        _, signs = gram_bound_gemm.gram_bound_forward(taps, None)
        ones = torch.ones(1, channels)
        gram_bound_gemm.gram_bound_backward(taps, signs, ones, ones, torch.empty_like(taps))
    assert count.total == (45 + 81) * channels**3


@pytest.mark.skipif(NO_CPP, reason="lipfast._C is not built")
@pytest.mark.parametrize(("channels", "forward"), [(24, 81), (48, 54), (120, 45)])
def test_work_with_cpp(channels, forward):
    taps = torch.randn(1, 3, 3, channels, channels)
    signs = torch.empty(1, channels, 13, channels, dtype=torch.int8)
    ones = torch.ones(1, channels)
    with CountProducts() as count:
        gram_bound_cpp.gram_bound_forward(taps, ones, signs)
        gram_bound_cpp.gram_bound_backward(taps, signs, ones, ones, torch.empty_like(taps))
    assert count.total == (forward + 81) * channels**3


@pytest.mark.parametrize("backend", [CPP, "torch"])
def test_is_deterministic(backend):
    weight, q, grad = (t.detach().float() for t in draw((96, 96, 3, 3), "in"))
    weight.requires_grad_(), q.requires_grad_()
    runs = []
    for _ in range(4):
        r = gram_bound(weight, q, backend=backend)
        runs.append((r, *torch.autograd.grad(r, (weight, q), grad)))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.skipif(NO_CPP, reason="lipfast._C is not built")
def test_extension_refuses_what_is_missing():
    extension, ones, signs = backends.extension(), torch.ones(1, 3), torch.ones(1, dtype=torch.int8)
    params = gram_bound_cuda.gram_bound_params((1, 3, 3, 3, 3), None, None, ones, signs, ones)
    with pytest.raises(ValueError, match="taps must not be null"):
        extension.gram_bound_forward_cpu(params, extension.GramBoundProducts.SUMMED)
    with pytest.raises(ValueError, match="a must not be null"):
        extension.gram_bound_backward_cpu(params, True)


def test_chooses_the_fast_path_and_obeys():
    weight = torch.randn(3, 4, 3, 3)
    assert backends.choose("gram_bound", weight) == ("torch" if NO_CPP else "cpp")
    with lipfast.backend("reference"):
        torch.testing.assert_close(gram_bound(weight), gram_bound(weight, backend="torch"))


def one(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD_INPUTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: gram_bound([[1.0]]), TypeError, "weight must be a torch.Tensor, got list"),
    (lambda: gram_bound(one(2, 2, dtype=torch.int64)), TypeError, "weight .* got torch.int64"),
    (lambda: gram_bound(one(2, 2, dtype=torch.complex64)), TypeError, "got torch.complex64"),
    (lambda: gram_bound(one(4)), ValueError, r"weight must have the shape .* got \(4,\)"),
    (lambda: gram_bound(one(1, 1, 1, 1, 1, 1)), ValueError, "weight must have the shape"),
    (lambda: gram_bound(one(2, 2, 0, 3)), ValueError, r"weight has no taps.*\(2, 2, 0, 3\)"),
    (lambda: gram_bound(one(2, 2), axis="both"), ValueError, "axis must be 'in' or 'out'"),
    (lambda: gram_bound(one(3, 2), groups=2), ValueError, "groups must divide the 3 output"),
    (lambda: gram_bound(one(3, 2), groups=0), ValueError, "groups must divide .* got 0"),
    (lambda: gram_bound(one(3, 2), groups=1.0), ValueError, "groups must divide .* got 1.0"),
    (lambda: gram_bound(one(2, 2), [1.0, 1.0]), TypeError, "q must be a torch.Tensor or None"),
    (
        lambda: gram_bound(one(2, 2), one(2, dtype=torch.float64)),
        TypeError,
        "q must have the dtype torch.float32 of weight, got torch.float64",
    ),
    (lambda: gram_bound(one(2, 3), one(2)), ValueError, r"q must have the shape \(3,\)"),
    (
        lambda: gram_bound(one(4, 2, 3, 3), one(2), groups=2),
        ValueError,
        r"q must have the shape \(4,\) of the result, got \(2,\)",
    ),
    (
        lambda: gram_bound(one(2, 2), torch.ones(2, device="meta")),
        ValueError,
        "q must be on the device cpu of weight, got meta",
    ),
    (
        lambda: gram_bound(torch.ones(2, 2, device="meta"), backend="cpp"),
        ValueError,
        "'cpp' cannot",
    ),
    (lambda: gram_bound(one(2, 2), backend="cuda"), ValueError, "backend 'cuda' cannot run"),
    (
        lambda: gram_bound(one(2, 2, dtype=torch.float64), backend="triton"),
        ValueError,
        "it computes in float32",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_INPUTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
