"""residual_conv on the CPU: values, derivatives, what is saved, registration, refusals."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from residual_conv_cases import F64, arguments
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lipfast
from lipfast import backends
from lipfast import nn as lnn
from lipfast.ops import residual_conv
from lipfast.ops.residual_conv import _pack, _unpack
from lipfast.reference import residual_conv as published
from lipfast.saved import saved_bytes

OP = torch.ops.lipfast.residual_conv.default
CASES = list(itertools.product(("zeros", "circular"), (1, 3, 5, (3, 1)), (2, 3, 5)))


@pytest.fixture(autouse=True)
def chosen_everywhere(request, monkeypatch):
    """Let "torch" be the choice on a CPU too, where the published form is the faster one."""
    if request.node.originalname != "test_choice_of_backend":
        rules = tuple(backends._Rule(device, 0, ("torch",)) for device in ("cpu", "cuda"))
        monkeypatch.setitem(backends._FASTEST, "residual_conv", rules)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor | None], mode: str):
    y = function(*inputs, mode)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], grad.to(y.dtype))]


@pytest.mark.parametrize(("mode", "k", "hidden"), CASES)
def test_first_and_second_derivative(mode, k, hidden):
    for bias, scalar in itertools.product((True, False), (True, False)):
        inputs = arguments((2, 3, 3, 4), hidden, k, bias=bias, scalar=scalar)

        def function(*given: Tensor) -> Tensor:
            x, kernel, *rest = given
            return residual_conv(x, kernel, rest[0] if bias else None, rest[-1], mode)  # noqa: B023

        given = [t for t in inputs if t is not None]
        assert torch.autograd.gradcheck(function, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_is_as_near_to_float64_as_the_published_form(mode, layout, dtype, poisoned_empty):
    for shape, hidden, k in [((2, 8, 6, 7), 12, 3), ((3, 5, 1, 1), 3, 5), ((1, 1, 2, 9), 1, 1)]:
        inputs = arguments(shape, hidden, k, dtype=dtype)
        inputs[0] = inputs[0].detach().contiguous(memory_format=layout).requires_grad_()
        wide = [t.detach().double().requires_grad_() for t in inputs]
        exact = gradients(published, wide, mode)
        ours = gradients(residual_conv, inputs, mode)
        theirs = gradients(published, inputs, mode)
        for a, b, c in zip(exact, ours, theirs, strict=True):
            assert b.dtype == dtype
            error, other = ((value.double() - a).norm() for value in (b, c))
            floor = 4 * torch.finfo(dtype).eps * float(a.detach().norm())
            assert float(error.detach()) <= 2 * float(other.detach()) + floor


@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_on_request(wanted):
    inputs = arguments()
    full = gradients(published, inputs, "circular")[1:]
    chosen = [i for i in range(4) if wanted >> i & 1]
    inputs = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(inputs)]
    y = residual_conv(*inputs, "circular")
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    y.backward(grad)
    for i, tensor in enumerate(inputs):
        if i in chosen:
            torch.testing.assert_close(tensor.grad, full[i])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1001])
def test_bits_survive_packing(size):
    bits = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.5
    mask = _pack(bits)
    expected = [sum(int(b) << j for j, b in enumerate(bits[i : i + 8])) for i in range(0, size, 8)]
    assert mask.tolist() == expected
    assert torch.equal(_unpack(mask, (1, 1, 1, size), False).flatten(), bits)


def test_saves_one_bit_per_hidden_value():
    inputs = arguments((2, 6, 5, 7), 11, dtype=torch.float32)
    saved = saved_bytes(lambda: residual_conv(*inputs, "zeros"), *inputs)
    assert saved == math.ceil(2 * 11 * 5 * 7 / 8)


@pytest.mark.parametrize("method", ["cpl", "sll"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_layer_saves_little_more_than_its_input(method, mode):
    layer = lnn.METHODS[method].conv(16, 16, 3, padding_mode=mode)
    x = torch.randn(128, 16, 16, 16, requires_grad=True)
    assert saved_bytes(lambda: layer(x), *layer.parameters()) <= 1.1 * x.nbytes
    with lipfast.backend("reference"):
        assert saved_bytes(lambda: layer(x), *layer.parameters()) >= 2.9 * x.nbytes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_keeps_the_memory_format(layout):
    inputs = arguments((4, 6, 8, 8), 5, dtype=torch.float32)
    x = inputs[0].detach().to(memory_format=layout).requires_grad_()
    y = residual_conv(x, *inputs[1:], "zeros")
    y.backward(torch.randn_like(y))
    assert y.stride() == x.stride()
    assert x.grad.stride() == x.stride()


def test_strided_input_and_expanded_gradient():
    inputs = arguments()
    x = torch.stack([inputs[0].detach()] * 2, dim=-1)[..., 0].requires_grad_()
    for function in (residual_conv, published):
        y = function(x, *inputs[1:], "zeros")
        grads = torch.autograd.grad(y.sum(), [x, *inputs[1:]])
        if function is residual_conv:
            ours = grads
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_convolves_in_bfloat16_and_keeps_dtypes(x_dtype):
    inputs = arguments((4, 8, 6, 6), 8, dtype=torch.float32)
    inputs[0] = inputs[0].detach().to(x_dtype).requires_grad_()
    exact = gradients(published, [t.detach().double().requires_grad_() for t in inputs], "zeros")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(residual_conv, inputs, "zeros")
    assert [t.dtype for t in ours] == [x_dtype, *(t.dtype for t in inputs)]
    for a, b in zip(exact, ours, strict=True):
        error = float((a - b.double()).norm() / a.norm())
        assert error < 0.02
    assert error > 1e-6  # the convolutions are not those of float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = [t.detach().double() for t in inputs]
        torch.testing.assert_close(residual_conv(*wide, "zeros"), exact[0].detach())


def test_backward_under_autocast_is_that_of_the_forward_dtype():
    inputs = arguments(dtype=torch.float32)
    y = residual_conv(*inputs, "zeros")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = torch.autograd.grad(y.sum(), inputs)
    exact = torch.autograd.grad(residual_conv(*inputs, "zeros").sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_empty_batch(mode):
    y, *grads = gradients(residual_conv, arguments((0, 3, 4, 5)), mode)
    assert y.shape == (0, 3, 4, 5)
    assert not any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 5), (2, 1, 3, 3), (2, 3, 1, 1)])
def test_registration(shape, layout):
    for bias, scalar in [(True, False), (False, True)]:
        x, *rest = arguments(shape, 4, bias=bias, scalar=scalar, dtype=torch.float32)
        x = x.detach().contiguous(memory_format=layout).requires_grad_()
        torch.library.opcheck(OP, (x, *rest, "circular", torch.float32, "torch"))
    torch.library.opcheck(OP, (x, *rest, "zeros", torch.bfloat16, "torch"))


def test_fake_tensors_have_shape_dtype_and_strides():
    with FakeTensorMode():
        x = torch.empty(2, 5, 4, 4, device="cuda").to(memory_format=torch.channels_last)
        kernel, scale = torch.empty(7, 5, 3, 3, device="cuda"), torch.empty((), device="cuda")
        y = residual_conv(x, kernel, None, scale, "zeros")
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
        assert OP(x, kernel, None, scale, "zeros", x.dtype, "torch")[1].shape == (28,)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", ["cpl", "sll"])
def test_training_step_is_one_graph(method, layout):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(lnn.METHODS[method].conv(4, 6, 3), lnn.METHODS[method].conv(6, 6, 1))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 4, 5, 5).to(memory_format=layout)

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.load_state_dict(start)
        loss = function(x).square().sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for ours, expected in zip(step(torch.compile(model, fullgraph=True)), step(model), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_torch_func_takes_the_published_form():
    inputs = [t.detach() for t in arguments()]
    jacobian = torch.func.jacrev(lambda x: residual_conv(x, *inputs[1:], "zeros"))(inputs[0])
    expected = torch.autograd.functional.jacobian(
        lambda x: residual_conv(x, *inputs[1:], "zeros"), inputs[0]
    )
    torch.testing.assert_close(jacobian, expected)
    with pytest.raises(ValueError, match=r"'torch' cannot run: the transforms of torch\.func"):
        torch.func.vmap(lambda x: residual_conv(x, *inputs[1:], "zeros", backend="torch"))(
            inputs[0][None]
        )


def test_choice_of_backend():
    x, *rest = arguments()
    assert backends.choose("residual_conv", x, *rest) == "reference"
    torch.testing.assert_close(
        residual_conv(x, *rest, "zeros"), residual_conv(x, *rest, "zeros", backend="torch")
    )
    with lipfast.backend("reference"):
        assert torch.equal(residual_conv(x, *rest, "zeros"), published(x, *rest, "zeros"))
    meta = [t.to("meta") for t in (x, *rest)]
    assert residual_conv(*meta, "zeros").is_meta
    with pytest.raises(ValueError, match=r"'torch' cannot run: .* got one on meta"):
        residual_conv(*meta, "zeros", backend="torch")


def test_is_deterministic_and_leaves_its_arguments_alone():
    inputs = arguments((4, 8, 9, 9), 8, dtype=torch.float32)
    before = [t.detach().clone() for t in inputs]
    first, again = (gradients(residual_conv, inputs, "zeros") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


X, W, B, T = (t.detach() for t in arguments())
BAD_ARGUMENTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: residual_conv(X.numpy(), W, B, T, "zeros"), TypeError, "x must be a torch.Tensor"),
    (lambda: residual_conv(X, W, B, 1.0, "zeros"), TypeError, "scale must be .* got float"),
    (lambda: residual_conv(X.long(), W, B, T, "zeros"), TypeError, "dtype of x .*torch.int64"),
    (lambda: residual_conv(X, W.float(), B, T, "zeros"), TypeError, "of kernel .*torch.float32"),
    (lambda: residual_conv(X, W, B, T.half(), "zeros"), TypeError, "of scale .*torch.float16"),
    (lambda: residual_conv(X[0], W, B, T, "zeros"), ValueError, r"\(n, c, h, w\), got \(3, 4, 5\)"),
    (lambda: residual_conv(X, W[:, :2], B, T, "zeros"), ValueError, r"\(hidden, 3, kh, kw\)"),
    (lambda: residual_conv(X, W[..., :2], B, T, "zeros"), ValueError, r"odd .*\(3, 3, 3, 2\)"),
    (lambda: residual_conv(X, W, B[:2], T, "zeros"), ValueError, r"bias .*\(3,\), got \(2,\)"),
    (lambda: residual_conv(X, W, B, T[:1], "zeros"), ValueError, r"scale .*\(3,\) or \(\), got"),
    (lambda: residual_conv(X, W, B, T, "reflect"), ValueError, "padding_mode .*got 'reflect'"),
    (lambda: residual_conv(X, W, B, T, "zeros", backend="triton"), ValueError, "x has float64"),
    (lambda: residual_conv(X, W, B, T, "zeros", backend="cuda"), ValueError, "has only the"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_ARGUMENTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
