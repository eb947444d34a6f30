"""The residual layer of CPL (Meunier et al. 2022) and SLL (Araujo et al. 2023)."""

from torch import Tensor

from .convolution import conv2d_same, conv2d_same_adjoint


def residual_conv(
    x: Tensor, kernel: Tensor, bias: Tensor | None, scale: Tensor, padding_mode: str
) -> Tensor:
    """Return x - W^T (scale * relu(W x + bias)), W the convolution with `kernel`.

    1-Lipschitz where diag(2 / scale) - W W^T is positive semi-definite (CPL, proposition 1; SLL,
    theorem 3).

    Args:
        x: (n, c, h, w).
        kernel: (hidden, c, kh, kw), odd kh and kw.
        bias: (hidden,) or None.
        scale: (hidden,) or a tensor without axes, non-negative.
        padding_mode: "zeros" or "circular".
    """
    hidden = conv2d_same(x, kernel, bias, padding_mode).relu()
    hidden = hidden * (scale[:, None, None] if scale.dim() else scale)
    return x - conv2d_same_adjoint(hidden, kernel, padding_mode)
