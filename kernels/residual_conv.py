"""residual_conv in Triton: two convolutions that do the rest in their epilogues."""

import torch
from torch import Tensor

from .convolution import (
    convolution_masked,
    convolution_relu,
    convolution_sum,
    pack_adjoint_taps,
    pack_taps,
)
from .launch import on_its_gpu


@on_its_gpu
def residual_conv_forward(
    x: Tensor,  # (n, c, h, w)
    kernel: Tensor,  # (hidden, c, kh, kw)
    bias: Tensor | None,  # (hidden,)
    scale: Tensor,  # (hidden,) or ()
    padding_mode: str,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return x - W^T (scale * relu(W x + bias)), and where the relu is active.

    Maps are computed in channels-last memory; x in other memory is copied first, and y back.

    Args:
        x, kernel, bias, scale: float32, bfloat16 or float16; odd kh and kw.
        padding_mode: "zeros" or "circular".
        dtype: of the operands of the convolutions; their sums are float32.

    Returns:
        y, in the dtype and memory format of x, and a mask, uint8: bit j % 8 of byte j // 8 belongs
        to hidden value j in the order (n, h, w, hidden).
    """
    dense = x.contiguous(memory_format=torch.channels_last)
    hidden = _empty(x, kernel.shape[0], dtype)
    mask = x.new_empty((hidden.numel() + 7) // 8, dtype=torch.uint8)
    taps, bias = pack_taps(kernel.to(dtype)), _dense(bias)
    convolution_relu(dense.to(dtype), taps, bias, padding_mode, hidden, mask)
    y = torch.empty_like(x)
    if dense is x:
        _subtract(dense, hidden, kernel, scale, padding_mode, y)
    else:
        y.copy_(residual_conv_subtract(dense, hidden, kernel, scale, padding_mode))
    return y, mask


@on_its_gpu
def residual_conv_masked(
    x: Tensor, kernel: Tensor, bias: Tensor | None, mask: Tensor, padding_mode: str
) -> Tensor:
    """Return W x + bias where the mask has a bit and 0 elsewhere, in channels-last memory.

    Args:
        x: (n, c, h, w), of the dtype in which the convolution runs.
        kernel, bias, padding_mode: as in `residual_conv_forward`.
        mask: from `residual_conv_forward`.
    """
    out = _empty(x, kernel.shape[0], x.dtype)
    dense = x.contiguous(memory_format=torch.channels_last)
    taps = pack_taps(kernel.to(x.dtype))
    convolution_masked(dense, taps, _dense(bias), padding_mode, mask, out)
    return out


@on_its_gpu
def residual_conv_subtract(
    x: Tensor, hidden: Tensor, kernel: Tensor, scale: Tensor, padding_mode: str
) -> Tensor:
    """Return x - W^T (scale * hidden), of the dtype of x, in channels-last memory.

    Args:
        x: (n, c, h, w).
        hidden: (n, hidden, h, w), of the dtype in which the convolution runs, in channels-last
            memory.
        kernel, scale, padding_mode: as in `residual_conv_forward`.
    """
    out = _empty(x, x.shape[1], x.dtype)
    dense = x.contiguous(memory_format=torch.channels_last)
    _subtract(dense, hidden, kernel, scale, padding_mode, out)
    return out


def _subtract(
    x: Tensor, hidden: Tensor, kernel: Tensor, scale: Tensor, padding_mode: str, out: Tensor
) -> None:
    scaled = kernel.float() * scale.float().reshape(-1, 1, 1, 1)
    taps = pack_adjoint_taps(scaled.to(hidden.dtype))
    convolution_sum(hidden, taps, padding_mode, out, beta=-1.0, alpha=1.0, addend=x)


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _empty(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    n, _, h, w = x.shape
    layout = torch.channels_last
    return torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=layout)
