"""The registered op of polar: (B, P, m, n) real tensors, m <= n, P = 1 real or 2 planar complex."""

import importlib
from typing import Any

import torch
from torch import Tensor

from lipfast.ops import polar_again, polar_gemm
from lipfast.ops.context import by_torch, is_plain, without_autocast
from lipfast.ops.polar_schedules import coefficients

_LAUNCHERS = {
    "triton": "lipfast.kernels.polar",
    "cuda": "lipfast.ops.polar_cuda",
    "torch": "lipfast.ops.polar_gemm",
}


def polar_op(
    x: Tensor, schedule: str, derivative: str, steps: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the polar factors of x (B, P, m, n), differentiable, and the residuals (B,)."""
    arguments = (x, schedule, derivative, steps, backend)
    if is_plain(x) and not x.is_meta:
        # A small matrix would spend a tenth of its time in the registered op's dispatch.
        return _Eager.apply(*arguments)
    return torch.ops.lipfast.polar(*arguments)


def _forward(
    x: Tensor, schedule: str, derivative: str, steps: int, backend: str
) -> tuple[Tensor, Tensor]:
    with without_autocast(x):
        table = coefficients(schedule, x.dtype == torch.float64)
        return launcher(backend).polar_forward(x.contiguous(), table)


def _backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor | None,
    schedule: str,
    derivative: str,
    steps: int,
    backend: str,
) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    with without_autocast(x):
        if w is None:
            return polar_gemm.polar_jvp(grad, x, coefficients(schedule, x.dtype == torch.float64))
        return launcher(backend).polar_backward(grad, x, w, steps)


def launcher(backend: str) -> Any:
    """Return the module with this backend's polar_forward and polar_backward."""
    return importlib.import_module(_LAUNCHERS[backend])


def _forward_fake(
    x: Tensor, schedule: str, derivative: str, steps: int, backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[0])


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    w: Tensor | None,
    schedule: str,
    derivative: str,
    steps: int,
    backend: str,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *ctx.options = inputs
    w, residual = output
    ctx.mark_non_differentiable(residual)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w if ctx.options[1] == "cg" else None)


def _gradient(ctx, grad: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None, None
    if by_torch(grad):
        return _differentiable(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None
    grad_x = torch.ops.lipfast.polar_backward(grad, *ctx.saved_tensors, *ctx.options)
    return grad_x, None, None, None, None


def _differentiable(grad: Tensor, x: Tensor, w: Tensor | None, schedule: str, *_: Any) -> Tensor:
    """`_backward` by differentiable operations, with a direct solution for w."""
    with without_autocast(x):
        if w is not None:
            return polar_again.implicit(grad, x, w)
        return polar_again.unrolled(grad, x, coefficients(schedule, x.dtype == torch.float64))


class _Eager(torch.autograd.Function):
    """The op without a dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        if grad is None:
            return None, None, None, None, None
        if by_torch(grad):
            return _gradient(ctx, grad, None)
        return _backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


torch.library.define(
    "lipfast::polar",
    "(Tensor x, str schedule, str derivative, int steps, str backend) -> (Tensor, Tensor)",
)
torch.library.impl("lipfast::polar", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::polar", _forward_fake)
torch.library.register_autograd("lipfast::polar", _gradient, setup_context=_save)

torch.library.define(
    "lipfast::polar_backward",
    "(Tensor grad, Tensor x, Tensor? w, str schedule, str derivative, int steps, str backend) "
    "-> Tensor",
)
torch.library.impl("lipfast::polar_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("lipfast::polar_backward", _backward_fake)
