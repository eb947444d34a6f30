"""The residual layer of CPL and SLL, which keeps its input and one bit per hidden value."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from lipfast import backends
from lipfast.ops import residual_conv_triton
from lipfast.ops.context import autocast_dtype
from lipfast.reference import circular_pad, conv2d_same, conv2d_same_adjoint
from lipfast.reference import residual_conv as published

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_GATHER = 0x0102040810204080  # times eight bytes 0 or 1: their bits in the top byte
_SPREAD = 0x0101010101010101  # times a byte: eight copies of it
_SELECT = 0x8040201008040201 - (1 << 64)  # bit i of copy i, as a signed integer


def residual_conv(
    x: Tensor,  # (n, c, h, w)
    kernel: Tensor,  # (hidden, c, kh, kw)
    bias: Tensor | None,  # (hidden,)
    scale: Tensor,  # (hidden,) or ()
    padding_mode: str,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return x - W^T (scale * relu(W x + bias)), W the convolution with `kernel`.

    1-Lipschitz where diag(2 / scale) - W W^T is positive semi-definite. Differentiable in x,
    kernel, bias and scale, any number of times. The backward pass keeps the arguments and one bit
    per hidden value, and computes the hidden values again. Derivation: docs/math/residual_conv.md.

    Under autocast the convolutions run in its dtype; the residual sum keeps the dtype of x.

    Args:
        x: (n, c, h, w), float64, float32, bfloat16 or float16; n may be 0. Contiguous and
            channels-last memory is used as it is, other memory is copied first.
        kernel: (hidden, c, kh, kw), odd kh and kw; any number of hidden channels.
        bias: (hidden,) or None.
        scale: (hidden,) or a tensor without axes, non-negative.
        padding_mode: "zeros" or "circular".
        backend: "torch" is torch's convolutions with this derivative, "triton" (not float64) has
            kernels for channels-last memory, "reference" is the published form with torch's
            derivative, which keeps three inputs; None takes the forced backend
            (`lipfast.set_backend`), or else "torch" on a GPU and the faster "reference" on a CPU.

    Returns:
        y: (n, c, h, w), dtype, device and memory format of x.

    Raises:
        TypeError: an argument is no tensor, or its dtype is another one than that of x without
            autocast.
        ValueError: a shape or the padding mode is wrong, or the backend cannot run.

    Source: Meunier et al. 2022, equation 8 (CPL); Araujo et al. 2023, theorem 3 (SLL).
    """
    dtype = _check(x, kernel, bias, scale, padding_mode)
    chosen = backends.choose("residual_conv", x, kernel, bias, scale, backend=backend)
    if chosen == "reference":
        return published(x, kernel, bias, scale, padding_mode)
    arguments = (x, kernel, bias, scale, padding_mode, dtype, chosen)
    return torch.ops.lipfast.residual_conv(*arguments)[0]


def _check(
    x: Tensor, kernel: Tensor, bias: Tensor | None, scale: Tensor, padding_mode: str
) -> torch.dtype:
    """Return the dtype of the convolutions."""
    tensors = {"x": x, "kernel": kernel, "scale": scale}
    if bias is not None:
        tensors["bias"] = bias
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"residual_conv: {name} must be a torch.Tensor, got {type(value).__name__}"
            )
    dtype = autocast_dtype(x)
    for name, value in tensors.items():
        expected = _DTYPES if dtype is not None and name != "x" else (x.dtype,)
        if value.dtype not in expected or value.dtype not in _DTYPES:
            wanted = ", ".join(map(str, _DTYPES)) if name == "x" else f"{x.dtype} as that of x"
            raise TypeError(
                f"residual_conv: the dtype of {name} must be {wanted}, got {value.dtype}"
            )
    if x.dim() != 4:
        raise ValueError(f"residual_conv: x must have the shape (n, c, h, w), got {tuple(x.shape)}")
    if (
        kernel.dim() != 4
        or kernel.shape[1] != x.shape[1]
        or not all(k % 2 for k in kernel.shape[2:])
    ):
        raise ValueError(
            f"residual_conv: kernel must have the shape (hidden, {x.shape[1]}, kh, kw) with odd kh "
            f"and kw, got {tuple(kernel.shape)}"
        )
    hidden = kernel.shape[0]
    if bias is not None and bias.shape != (hidden,):
        raise ValueError(
            f"residual_conv: bias must have the shape ({hidden},), got {tuple(bias.shape)}"
        )
    if scale.shape not in ((), (hidden,)):
        raise ValueError(
            f"residual_conv: scale must have the shape ({hidden},) or (), got {tuple(scale.shape)}"
        )
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"residual_conv: padding_mode must be 'zeros' or 'circular', got {padding_mode!r}"
        )
    return x.dtype if dtype is None else dtype


def _can_run(x: Tensor, *others: Tensor | None) -> str | None:
    if x.is_meta:
        return "it needs tensors on a CPU or a CUDA GPU, got one on meta"
    return None


def _triton_can_run(x: Tensor, *others: Tensor | None) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in float32, and x has float64"
    return backends.triton_can_run(x) or _can_run(x, *others)


backends.register(
    "residual_conv",
    {"triton": _triton_can_run, "torch": _can_run, "reference": lambda *tensors: None},
)


def _forward(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    padding_mode: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    channels_last = _is_channels_last(x)
    x = _to_layout(x, channels_last)
    if backend == "triton":
        return residual_conv_triton.forward(x, kernel, bias, scale, padding_mode, dtype)
    hidden = _convolve(x, kernel, bias, padding_mode, dtype).relu_()
    mask = _pack(_in_memory_order(hidden, channels_last) > 0)
    second = _adjoint(hidden, kernel, scale, padding_mode, dtype)
    return torch.sub(x, second, out=torch.empty_like(x)), mask


def _forward_fake(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    padding_mode: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    values = x.shape[0] * kernel.shape[0] * x.shape[2] * x.shape[3]
    y = torch.empty_like(_to_layout(x, _is_channels_last(x)))
    return y, x.new_empty((values + 7) // 8, dtype=torch.uint8)


def _backward(ctx, grad: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    """Gradients by differentiable operations: with create_graph they can be derived again."""
    if grad is None:
        return (None,) * 7
    x, kernel, bias, scale, mask = ctx.saved_tensors
    for_x, for_kernel, for_bias, for_scale = ctx.needs_input_grad[:4]
    mode, dtype, device = ctx.padding_mode, ctx.dtype, x.device.type
    channels_last = ctx.backend == "triton" or _is_channels_last(x)
    fused = ctx.backend == "triton" and not torch.is_grad_enabled()
    shape = (x.shape[0], kernel.shape[0], *x.shape[2:])
    active = None if fused else _unpack(mask, shape, channels_last)

    def masked(x: Tensor, bias: Tensor | None) -> Tensor:
        if active is None:
            return residual_conv_triton.masked(x.to(dtype), kernel, bias, mask, mode)
        return _convolve(x, kernel, bias, mode, dtype) * active

    grad_x = grad_kernel = grad_bias = grad_scale = None
    with torch.autocast(device, enabled=False):
        grad = _to_layout(grad, channels_last)
        inner = masked(grad, None)
        if for_x and fused:
            grad_x = residual_conv_triton.subtract(grad, inner, kernel, scale, mode)
        elif for_x:
            second = _adjoint(inner, kernel, scale, mode, dtype)
            grad_x = (grad - second).to(x.dtype)
        wide = torch.promote_types(kernel.dtype, torch.float32)
        if for_bias:
            sums = inner.sum(dim=(0, 2, 3), dtype=wide)
            grad_bias = (-scale.to(wide) * sums).to(bias.dtype)
        if for_kernel or for_scale:
            hidden = masked(x, bias)
            outer = _kernel_gradient(grad, hidden, kernel, mode, dtype).to(wide)
        if for_kernel:
            both = outer + _kernel_gradient(x, inner, kernel, mode, dtype).to(wide)
            grad_kernel = -_scaled(both, scale.to(wide)).to(kernel.dtype)
        if for_scale:
            sums = -(outer * kernel.to(wide)).sum(dim=(1, 2, 3))
            grad_scale = (sums if scale.dim() else sums.sum()).to(scale.dtype)
    return grad_x, grad_kernel, grad_bias, grad_scale, None, None, None


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, kernel, bias, scale, ctx.padding_mode, ctx.dtype, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, kernel, bias, scale, output[1])


def _convolve(
    x: Tensor, kernel: Tensor, bias: Tensor | None, padding_mode: str, dtype: torch.dtype
) -> Tensor:
    bias = None if bias is None else bias.to(dtype)
    return conv2d_same(x.to(dtype), kernel.to(dtype), bias, padding_mode)


def _adjoint(
    y: Tensor, kernel: Tensor, scale: Tensor, padding_mode: str, dtype: torch.dtype
) -> Tensor:
    """W^T diag(scale) y."""
    return conv2d_same_adjoint(y, _scaled(kernel, scale).to(dtype), padding_mode)


def _scaled(kernel: Tensor, scale: Tensor) -> Tensor:
    """diag(scale) W, in at least float32."""
    wide = torch.promote_types(kernel.dtype, torch.float32)
    scale = scale.to(wide)
    return kernel.to(wide) * (scale[:, None, None, None] if scale.dim() else scale)


def _kernel_gradient(
    x: Tensor, y: Tensor, kernel: Tensor, padding_mode: str, dtype: torch.dtype
) -> Tensor:
    """Derivative of the inner product of W x and y with respect to the kernel of W."""
    padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    x = x.to(dtype)
    if padding_mode == "circular":
        x, padding = circular_pad(x, *padding), (0, 0)
    return conv2d_weight(x, kernel.shape, y, padding=padding)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _to_layout(x: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=layout)


def _in_memory_order(x: Tensor, channels_last: bool) -> Tensor:
    """The values of (n, c, h, w) in the order (n, c, h, w), or (n, h, w, c), as one vector."""
    return (x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1)


def _pack(bits: Tensor) -> Tensor:
    """Eight Booleans to a byte, the first in the lowest bit; the last byte is filled with 0."""
    words = F.pad(bits, (0, -len(bits) % 8)).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8)


def _unpack(mask: Tensor, shape: tuple[int, int, int, int], channels_last: bool) -> Tensor:
    """The Booleans (n, c, h, w) that `_pack` took in memory order."""
    bits = (mask.to(torch.int64) * _SPREAD & _SELECT).view(torch.uint8) != 0
    n, c, h, w = shape
    bits = bits[: math.prod(shape)]
    return bits.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else bits.view(shape)


torch.library.define(
    "lipfast::residual_conv",
    "(Tensor x, Tensor kernel, Tensor? bias, Tensor scale, str padding_mode, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor)",
)
torch.library.impl("lipfast::residual_conv", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::residual_conv", _forward_fake)
torch.library.register_autograd("lipfast::residual_conv", _backward, setup_context=_save)
