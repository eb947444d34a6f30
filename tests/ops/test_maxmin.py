"""maxmin on the CPU: values, derivatives, registration, layouts, refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import maxmin
from lipfast.saved import saved_tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 4),
    (3, 7),
    (5, 1),
    (0, 4, 3),
    (2, 0, 3),
    (2, 4, 0),
    (2, 3, 5),
    (1, 2, 8),
    (2, 6, 3, 5),
]
SHAPES += [(3, 5, 4, 4), (2, 16, 32, 32), (2, 3, 2, 3, 4), (2, 17, 33, 31)]
SHAPES += [(40, 60, 2, 2), (5, 62, 4, 4)]  # small maps, more pairs than one chunk
BACKENDS = [
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(
            backends.cpp_can_run(torch.empty(0)) is not None, reason="lipfast._C is not built"
        ),
    ),
    "reference",
]
LAYOUTS = ["contiguous", "channels_last", "strided", "expanded"]

OP = torch.ops.lipfast.maxmin.default
BACKWARD_OP = torch.ops.lipfast.maxmin_backward.default


def expected(x: Tensor) -> Tensor:
    """The definition in float64, pair by pair."""
    y = x.detach().double().clone()
    for i in range(0, x.shape[1] - 1, 2):
        y[:, i] = torch.maximum(x[:, i].double(), x[:, i + 1].double())
        y[:, i + 1] = torch.minimum(x[:, i].double(), x[:, i + 1].double())
    return y


def expected_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The permutation that orders x, applied to grad: pairs swap where the second is larger."""
    out = grad.clone()
    for i in range(0, x.shape[1] - 1, 2):
        swap = x[:, i + 1].double() > x[:, i].double()
        out[:, i] = torch.where(swap, grad[:, i + 1], grad[:, i])
        out[:, i + 1] = torch.where(swap, grad[:, i], grad[:, i + 1])
    return out


def arrange(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


def distinct(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition_in_float64(shape, dtype, layout, backend, poisoned_empty):
    x = arrange(distinct(shape, dtype), layout)
    y = maxmin(x, backend=backend)
    assert y.dtype == dtype
    assert torch.equal(y.double(), expected(x))


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_permutation(shape, dtype, layout, grad_layout, poisoned_empty):
    x = arrange(distinct(shape, dtype), layout).requires_grad_()
    grad = arrange(distinct(shape, dtype, seed=1), grad_layout)
    (out,) = torch.autograd.grad(maxmin(x, backend="cpp"), x, grad)
    assert torch.equal(out, expected_gradient(x, grad))


@pytest.mark.parametrize("shape", [(4, 6, 8, 8), (4, 7, 8, 8)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_format(shape, layout):
    x = arrange(distinct(shape, torch.float32), layout)
    assert maxmin(x).stride() == x.stride()


def test_keeps_channels_last_3d():
    x = torch.randn(2, 4, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    assert maxmin(x).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, backend):
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).tiny / 2]
    values += [torch.finfo(dtype).max, torch.finfo(dtype).min]
    first, second = torch.meshgrid(*[torch.tensor(values, dtype=dtype)] * 2, indexing="ij")
    x = torch.stack([first, second]).flatten(1).unsqueeze(0)
    y = maxmin(x, backend=backend).double()
    assert torch.equal(
        y.nan_to_num(123.0, math.inf, -math.inf), expected(x).nan_to_num(123.0, math.inf, -math.inf)
    )
    assert torch.equal(y.isnan().all(dim=1), x.isnan().any(dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_do_not_swap(dtype):
    x = torch.tensor([[1.0, 1.0, 0.0, -0.0, -0.0, 0.0, math.inf, math.inf]], dtype=dtype)
    x = x.requires_grad_()
    grad = torch.arange(8, dtype=dtype).unsqueeze(0)
    (out,) = torch.autograd.grad(maxmin(x, backend="cpp"), x, grad)
    assert torch.equal(out, grad)


def test_gradient_keeps_its_norm_at_ties():
    x = torch.randint(-2, 3, (4, 6, 5, 5)).double().requires_grad_()
    grad = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    (out,) = torch.autograd.grad(maxmin(x, backend="cpp"), x, grad)
    assert torch.equal(out.flatten().sort().values, grad.flatten().sort().values)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 5, 3, 2), (3, 2)])
def test_first_and_second_derivative(shape):
    x = distinct(shape, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(maxmin, x)
    assert torch.autograd.gradgradcheck(maxmin, x)


@pytest.mark.parametrize(
    "shape", [(2, 4, 3), (2, 5, 3, 2), (3, 2), (0, 4, 3), (2, 1, 4), (2, 4, 1, 1)]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_registration(shape, layout):
    x = arrange(distinct(shape, torch.float32), layout).requires_grad_()
    torch.library.opcheck(OP, (x, "cpp"))
    y, mask = OP(x.detach(), "cpp")
    grad = torch.randn_like(y).requires_grad_()
    last = layout == "channels_last"
    torch.library.opcheck(BACKWARD_OP, (grad, mask, last, "cpp"))


@pytest.mark.parametrize("shape", [(4, 6, 8, 8), (3, 7, 5, 3)])
def test_saves_one_bit_per_pair(shape):
    x = torch.randn(shape, requires_grad=True)
    with saved_tensors() as saved:
        maxmin(x, backend="cpp")
    pairs = shape[0] * (shape[1] // 2) * math.prod(shape[2:])
    assert sum(tensor.nbytes for tensor in saved) == math.ceil(pairs / 8)


def test_every_mask_bit_is_written(poisoned_empty):
    _, mask = OP(torch.arange(3 * 2 * 3.0).reshape(3, 2, 3), "cpp")  # nine pairs, all swapped
    assert mask.tolist() == [255, 1]


def test_is_deterministic():
    x = torch.randn(8, 64, 32, 32)
    first = OP(x, "cpp")
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, OP(x, "cpp"), strict=True))


def test_does_not_write_or_alias_its_input():
    x = torch.randn(2, 1, 3)
    before = x.clone()
    y = maxmin(x)
    y.zero_()
    assert torch.equal(x, before)


def test_fake_tensors_have_shape_dtype_and_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 5, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        y = maxmin(x)
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert y.stride() == x.stride()
        y, mask = OP(torch.empty(2, 4, 3, device="cuda"), "triton")
        assert (y.device.type, y.shape, mask.shape) == ("cuda", (2, 4, 3), (2,))


BAD_INPUTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: maxmin([[1.0, 2.0]]), TypeError, "x must be a torch.Tensor, got list"),
    (lambda: maxmin(torch.ones(2, 2, dtype=torch.int64)), TypeError, "got torch.int64"),
    (lambda: maxmin(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "got torch.complex64"),
    (lambda: maxmin(torch.ones(4)), ValueError, r"shape \(n, c, ...\), got \(4,\)"),
    (lambda: maxmin(torch.ones(())), ValueError, r"shape \(n, c, ...\), got \(\)"),
    (lambda: maxmin(torch.ones(2, 2), backend="cudnn"), ValueError, "one of triton, cuda, cpp"),
    (
        lambda: BACKWARD_OP(torch.ones(2, 6), torch.ones(3), False, "cpp"),
        ValueError,
        "hold 1 uint8",
    ),
    (lambda: maxmin(torch.ones(2, 2, device="meta"), backend="cpp"), ValueError, "one on meta"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_INPUTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_other_devices_take_the_reference():
    assert maxmin(torch.empty(2, 3, 4, device="meta")).shape == (2, 3, 4)


def test_follows_the_thread_setting_of_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert backends.extension().openmp_threads() in (0, 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 128, 32, 32)])
def test_gpu_equals_the_definition_bit_for_bit(shape, dtype, layout, backend, poisoned_empty):
    x = arrange(distinct(shape, dtype), layout).cuda()
    x = arrange(x, layout).requires_grad_()
    grad = distinct(shape, dtype, seed=1).cuda()
    y = maxmin(x, backend=backend)
    (out,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(y.double(), expected(x))
    assert torch.equal(out, expected_gradient(x, grad))
    assert all(map(torch.equal, OP(x.detach(), backend), OP(x.detach(), backend)))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gpu_backends_write_the_same_mask(layout):
    x = arrange(torch.randn(3, 7, 5, 9).cuda(), layout)
    assert torch.equal(OP(x, "triton")[1], OP(x, "cuda")[1])
