"""2-d convolutions and the same-size one's adjoint, for zero and circular padding."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Convolve `x` (n, in, h, w) with `kernel` (out, in / groups, kh, kw), as `nn.Conv2d` does.

    `padding_mode` is "zeros" or "circular"; circular padding wraps as often as the map needs.
    """
    if _is_matrix(x, kernel) and groups == 1 and padding == (0, 0):
        return F.linear(x.flatten(1), kernel.flatten(1), bias)[:, :, None, None]
    if padding_mode == "zeros":
        return F.conv2d(x, kernel, bias, stride, padding, dilation, groups)
    return F.conv2d(circular_pad(x, *padding), kernel, bias, stride, 0, dilation, groups)


def conv2d_same(x: Tensor, kernel: Tensor, bias: Tensor | None, padding_mode: str) -> Tensor:
    """Convolve `x` (n, in, h, w) with an odd-sized `kernel` (out, in, kh, kw) to (n, out, h, w).

    `padding_mode` is "zeros" or "circular", see `conv2d`.
    """
    padding = (kernel.shape[-2] // 2, kernel.shape[-1] // 2)
    one = (1, 1)
    return conv2d(
        x, kernel, bias, padding_mode, stride=one, padding=padding, dilation=one, groups=1
    )


def conv2d_same_adjoint(y: Tensor, kernel: Tensor, padding_mode: str) -> Tensor:
    """Apply the adjoint of `conv2d_same(., kernel, None, padding_mode)` to `y` (n, out, h, w)."""
    if padding_mode == "zeros" and not _is_matrix(y, kernel):
        padding = (kernel.shape[-2] // 2, kernel.shape[-1] // 2)
        return F.conv_transpose2d(y, kernel, padding=padding)
    return conv2d_same(y, transpose_kernel(kernel), None, padding_mode)


def _is_matrix(x: Tensor, kernel: Tensor) -> bool:
    """Whether a convolution is a product of matrices, several times faster as such on a CPU."""
    return x.dim() == 4 and x.shape[-2:] == (1, 1) and kernel.shape[-2:] == (1, 1)


def transpose_kernel(kernel: Tensor) -> Tensor:
    """Return the kernel (..., in, out, kh, kw) whose convolution is the adjoint of `kernel`'s."""
    return kernel.transpose(-4, -3).flip(-2, -1)


def circular_pad(x: Tensor, ph: int, pw: int) -> Tensor:
    """Pad the last two axes periodically by `ph` and `pw` on each side, for any map size."""
    h, w = x.shape[-2:]
    if ph == 0 and pw == 0:
        return x
    if ph <= h and pw <= w and x.numel() > 0:
        return F.pad(x, (pw, pw, ph, ph), mode="circular")
    rows = torch.arange(-ph, h + ph, device=x.device) % h
    columns = torch.arange(-pw, w + pw, device=x.device) % w
    return x[..., rows, :][..., columns]
