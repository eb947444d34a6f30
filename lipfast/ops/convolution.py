"""A convolution with zero or circular padding, as fast as torch makes it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import reference
from lipfast.ops.context import is_plain
from lipfast.transforms import is_transformed


def conv2d(
    x: Tensor,
    kernel: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """`lipfast.reference.conv2d`, with circular padding differentiated in one piece."""
    if padding_mode == "circular" and _wraps_once(x, padding) and not is_transformed(x):
        x = _CircularPad.apply(x, *padding)
        padding_mode, padding = "zeros", (0, 0)
    return reference.conv2d(
        x,
        kernel,
        bias,
        padding_mode,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def _wraps_once(x: Tensor, padding: tuple[int, int]) -> bool:
    if padding == (0, 0) or not is_plain(x) or x.is_meta or x.numel() == 0:
        return False
    return padding[0] <= x.shape[-2] and padding[1] <= x.shape[-1]


class _CircularPad(torch.autograd.Function):
    """Torch's circular padding, whose own derivative fills a tensor for each of its slices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ph: int, pw: int) -> Tensor:
        ctx.padding = (ph, pw)
        return F.pad(x, (pw, pw, ph, ph), mode="circular")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        for axis, p in zip((-2, -1), ctx.padding, strict=True):
            size = grad.shape[axis] - 2 * p
            inner = grad.narrow(axis, p, size).clone()
            inner.narrow(axis, 0, p).add_(grad.narrow(axis, p + size, p))
            inner.narrow(axis, size - p, p).add_(grad.narrow(axis, 0, p))
            grad = inner
        return grad, None, None
