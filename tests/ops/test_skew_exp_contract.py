"""skew_exp: registration, the interface of its launchers, choice of backend, refusals."""

import types
from collections.abc import Callable

import pytest
import torch
from skew_exp_cases import T4, U5, arguments, gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lipfast
from lipfast import backends, reference
from lipfast.ops import skew_exp, skew_exp_conv, skew_exp_derivative

OP = torch.ops.lipfast.skew_exp.default
BACKWARD = torch.ops.lipfast.skew_exp_backward.default


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 3, 4, 5), torch.contiguous_format),
        ((2, 3, 4, 5), torch.channels_last),
        ((0, 3, 4, 5), torch.channels_last),
        ((2, 1, 3, 3), torch.contiguous_format),
    ],
)
def test_registration(shape, layout):
    x, kernel = arguments(shape, dtype=torch.float32)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    for keep, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        torch.library.opcheck(OP, (x, kernel, T4, "circular", keep, "torch", dtype))
    plain, small = x.detach(), kernel.detach()
    terms = OP(plain, small, T4, "zeros", True, "torch", x.dtype)[1]
    for saved in ((plain, small, None), (None, small, terms)):
        tests = ("test_schema", "test_faketensor")
        arguments_of = (plain, *saved, T4, "zeros", "torch", x.dtype)
        torch.library.opcheck(BACKWARD, arguments_of, test_utils=tests)


def test_fake_tensors_have_shape_dtype_and_strides():
    with FakeTensorMode():
        x = torch.empty(2, 5, 4, 4, device="cuda").to(memory_format=torch.channels_last)
        kernel = torch.empty(5, 5, 3, 3, device="cuda")
        y = skew_exp(x, kernel, U5)
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
        assert OP(x, kernel, U5, "zeros", True, "torch", x.dtype)[1].shape == (10, 5, 4, 4)


def test_launchers_get_and_give_what_they_promise(monkeypatch):
    """The Triton and CUDA launchers share one interface: here torch's convolutions stand in."""
    seen = []

    def forward(x, kernel, ratios, a0, padding_mode, *, keep):
        seen.append(("forward", x.dtype, kernel.dtype, x.is_contiguous(), len(ratios), a0))
        y, terms = skew_exp_conv.skew_exp_forward(x, kernel, ratios, a0, padding_mode, keep=keep)
        return y, terms.contiguous()

    def backward(grad, kernel, ratios, a0, padding_mode):
        seen.append(("backward", grad.dtype, kernel.dtype, grad.is_contiguous(), len(ratios), a0))
        return skew_exp_conv.skew_exp_backward(grad, kernel, ratios, a0, padding_mode)

    launcher = types.SimpleNamespace(skew_exp_forward=forward, skew_exp_backward=backward)
    monkeypatch.setattr(skew_exp_derivative, "_launcher", lambda backend: launcher)
    x, kernel = arguments(dtype=torch.float32)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = gradients(skew_exp, (x, kernel), U5, "zeros", backend="reference")
    for keep in (True, False):

        def op(x: Tensor, kernel: Tensor) -> Tensor:
            return OP(x, kernel, U5, "zeros", keep, "cuda", torch.float32)[0]  # noqa: B023

        for a, b in zip(expected, gradients(op, (x, kernel)), strict=True):
            torch.testing.assert_close(a, b)
    names = [entry[0] for entry in seen]
    assert names == ["forward", "backward", "forward", "forward", "backward"]
    assert {entry[1:] for entry in seen} == {(torch.float32, torch.float32, False, 5, U5[0])}


def test_choice_of_backend():
    x, kernel = arguments()
    assert backends.choose("skew_exp", x, kernel, 5, x.dtype) == "torch"
    with lipfast.backend("reference"):
        published = skew_exp(x, kernel, reference.taylor_coefficients(5), "zeros")
    assert torch.equal(published, reference.skew_exp(x, kernel, 5, "zeros"))
    meta = [t.to("meta") for t in (x, kernel)]
    assert skew_exp(*meta, U5).is_meta
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run"):
            skew_exp(x, kernel, U5, backend=name)


X, K = (t.detach() for t in arguments())
BAD_ARGUMENTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: skew_exp(X.numpy(), K, U5), TypeError, "x must be a torch.Tensor, got ndarray"),
    (lambda: skew_exp(X, None, U5), TypeError, "kernel must be .* got NoneType"),
    (lambda: skew_exp(X.long(), K, U5), TypeError, "dtype of x must be .*torch.int64"),
    (lambda: skew_exp(X, K.float(), U5), TypeError, "dtype of kernel .*torch.float32"),
    (lambda: skew_exp(X, K.to("meta"), U5), ValueError, "device cpu of x, got meta"),
    (lambda: skew_exp(X[0], K, U5), ValueError, r"\(n, c, h, w\), got \(3, 4, 5\)"),
    (lambda: skew_exp(X, K[:, :2], U5), ValueError, r"\(3, 3, kh, kw\) .*\(3, 2, 3, 3\)"),
    (lambda: skew_exp(X, K[..., :2], U5), ValueError, r"odd .*\(3, 3, 3, 2\)"),
    (lambda: skew_exp(X, K, (1.0,)), ValueError, r"coefficients must .*got \(1.0,\)"),
    (lambda: skew_exp(X, K, (1.0, 0.0, 1.0)), ValueError, "coefficients must .* other than 0"),
    (lambda: skew_exp(X, K, (1.0, float("nan"))), ValueError, "coefficients must .*nan"),
    (lambda: skew_exp(X, K, U5, "reflect"), ValueError, "padding_mode .*got 'reflect'"),
    (lambda: skew_exp(X, K, U5, save="all"), ValueError, "save must be .*got 'all'"),
    (lambda: skew_exp(X, K, U5, backend="cpp"), ValueError, "has only the backends"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_ARGUMENTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
