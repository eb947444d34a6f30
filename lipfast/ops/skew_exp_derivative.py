"""The registered form of skew_exp and its derivative, by the same recurrence with -L."""

import importlib
import itertools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from lipfast.ops import skew_exp_conv
from lipfast.ops.context import by_torch
from lipfast.reference import circular_pad, conv2d_same


def ratios(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """Return a_k / a_{k-1} for k = 1, ..., n."""
    return tuple(b / a for a, b in itertools.pairwise(coefficients))


def _forward(
    x: Tensor,
    kernel: Tensor,
    coefficients: tuple[float, ...],
    padding_mode: str,
    keep: bool,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    x = to_layout(x)
    arguments = (kernel.to(dtype), ratios(coefficients), coefficients[0], padding_mode)
    if backend == "torch":
        y, terms = skew_exp_conv.skew_exp_forward(x, *arguments, keep=keep)
        return y, terms.flatten(0, 1)
    y, terms = _launcher(backend).skew_exp_forward(x.to(dtype), *arguments, keep=keep)
    y = to_layout(y, x).to(x.dtype)
    if not keep:
        return y, _forward_fake(x, kernel, coefficients, padding_mode, keep, backend, dtype)[1]
    return y, to_layout(terms.flatten(0, 1), x)


def _forward_fake(
    x: Tensor,
    kernel: Tensor,
    coefficients: tuple[float, ...],
    padding_mode: str,
    keep: bool,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(to_layout(x))
    terms = skew_exp_conv.new_terms(y, len(coefficients) - 1 if keep else 0, dtype)
    return y, terms.flatten(0, 1)


def _backward_op(
    grad: Tensor,
    x: Tensor | None,
    kernel: Tensor,
    terms: Tensor | None,
    coefficients: tuple[float, ...],
    padding_mode: str,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grad = to_layout(grad)
    if terms is None:
        assert x is not None  # one of the two is saved
        terms = _forward(x, kernel, coefficients, padding_mode, True, backend, dtype)[1]
    steps, small = ratios(coefficients), kernel.to(dtype)
    arguments = (small, steps, coefficients[0], padding_mode)
    if backend == "torch":
        grad_x, scaled = skew_exp_conv.skew_exp_backward(grad, *arguments)
    else:
        grad_x, scaled = _launcher(backend).skew_exp_backward(grad.to(dtype), *arguments)
        grad_x = to_layout(grad_x, grad).to(grad.dtype)
    grad_kernel = _kernel_gradient(terms, scaled.flatten(0, 1), small, padding_mode)
    return grad_x, grad_kernel.to(kernel.dtype).contiguous()


def _backward_fake(
    grad: Tensor,
    x: Tensor | None,
    kernel: Tensor,
    terms: Tensor | None,
    coefficients: tuple[float, ...],
    padding_mode: str,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    grad_kernel = torch.empty_like(kernel, memory_format=torch.contiguous_format)
    return torch.empty_like(to_layout(grad)), grad_kernel


def _backward(
    ctx: Any, grad: Tensor | None, grad_terms: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, kernel, terms = ctx.saved_tensors
    coefficients, mode, backend, dtype = ctx.options
    nothing = (None,) * 5
    if terms is None:
        grad_terms = None  # of an output without entries
    with torch.autocast(kernel.device.type, enabled=False):
        if grad is None or grad_terms is not None or by_torch(grad):
            return (*_differentiable(ctx, grad, grad_terms), *nothing)
        grad = to_layout(grad, x if terms is None else terms)
        if not ctx.needs_input_grad[1]:
            turned = (-kernel, coefficients, mode, False, backend, dtype)
            return (torch.ops.lipfast.skew_exp(grad, *turned)[0], None, *nothing)
        gradients = torch.ops.lipfast.skew_exp_backward(
            grad, x, kernel, terms, coefficients, mode, backend, dtype
        )
        return (*gradients, *nothing)


def _differentiable(
    ctx: Any, grad: Tensor | None, grad_terms: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The same by differentiable operations; `grad_terms` comes from a second derivative.

    A gradient of the term z_k joins the recurrence as a summand of h_k.
    """
    x, kernel, terms = ctx.saved_tensors
    coefficients, mode, _, dtype = ctx.options
    steps, small = ratios(coefficients), kernel.to(dtype)
    inner: list[Tensor | None] = [None] * len(steps)
    if grad_terms is not None:
        inner = list(grad_terms.tensor_split(len(steps)))
    if grad is None and grad_terms is None:
        return None, None
    h = torch.zeros_like(inner[0]) if grad is None else grad * coefficients[0]  # type: ignore[arg-type]
    total, scaled = h, []
    for ratio, extra in zip(steps, inner, strict=True):
        scaled.append((ratio * h).to(dtype))
        h = -conv2d_same(scaled[-1], small, None, mode)
        if extra is not None:
            h = h + extra
        total = total + h
    grad_x = total.to(ctx.x_dtype)
    if not ctx.needs_input_grad[1]:
        return grad_x, None
    if terms is None:
        z = [x]
        for ratio in reversed(steps[1:]):
            image = conv2d_same(z[-1].to(dtype), small, None, mode)
            z.append(x + ratio * image)
        terms = torch.cat([value.to(dtype) for value in reversed(z)])
    grad_kernel = _kernel_gradient(terms, torch.cat(scaled), small, mode)
    return grad_x, grad_kernel.to(kernel.dtype)


def _kernel_gradient(terms: Tensor, scaled: Tensor, kernel: Tensor, padding_mode: str) -> Tensor:
    """Derivative of the inner product of L `terms` and `scaled` with respect to the kernel of L."""
    padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    if padding_mode == "circular":
        terms, padding = circular_pad(terms, *padding), (0, 0)
    return conv2d_weight(terms, kernel.shape, scaled, padding=padding)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, kernel, coefficients, padding_mode, keep, backend, dtype = inputs
    ctx.options = (tuple(coefficients), padding_mode, backend, dtype)
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((None, kernel, output[1]) if keep else (x, kernel, None)))


def _launcher(backend: str) -> ModuleType:
    if backend == "triton":
        return importlib.import_module("lipfast.kernels.skew_exp")
    return importlib.import_module("lipfast.ops.skew_exp_cuda")


def to_layout(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return x in the memory format of `like`, or its own: channels-last, or else contiguous."""
    example = x if like is None else like
    channels_last = not example.is_contiguous() and example.is_contiguous(
        memory_format=torch.channels_last
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout)


torch.library.define(
    "lipfast::skew_exp",
    "(Tensor x, Tensor kernel, float[] coefficients, str padding_mode, bool keep, str backend, "
    "ScalarType dtype) -> (Tensor, Tensor)",
)
torch.library.impl("lipfast::skew_exp", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::skew_exp", _forward_fake)
torch.library.register_autograd("lipfast::skew_exp", _backward, setup_context=_save)

torch.library.define(
    "lipfast::skew_exp_backward",
    "(Tensor grad, Tensor? x, Tensor kernel, Tensor? terms, float[] coefficients, "
    "str padding_mode, str backend, ScalarType dtype) -> (Tensor, Tensor)",
)
torch.library.impl("lipfast::skew_exp_backward", ("cpu", "cuda"), _backward_op)
torch.library.register_fake("lipfast::skew_exp_backward", _backward_fake)
