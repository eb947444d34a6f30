"""aol_rescale in plain PyTorch: the product is cast and laid out where it is written."""

import torch
from torch import Tensor


def aol_rescale_forward(weight: Tensor, r: Tensor, out: Tensor) -> None:
    """Write weight r^(-1/2) into out.

    Args:
        weight: (n, o, c, taps), contiguous, float64 or float32.
        r: (n, c), contiguous, dtype of weight.
        out: (n, o, c, taps) of any floating-point dtype and strides, written.
    """
    torch.mul(weight, _factors(r), out=out)


def aol_rescale_backward(grad: Tensor, weight: Tensor, r: Tensor, out: Tensor) -> Tensor:
    """Write dL/dweight into out, contiguous, and return the sums over it times weight, (n, c).

    dL/dr is -1 / (2 r) times these sums. Arguments as in the forward, grad of any dtype and
    strides.
    """
    torch.mul(grad, _factors(r), out=out)
    return (out * weight).sum(dim=(1, 3))


def _factors(r: Tensor) -> Tensor:
    return torch.where(r > 0, r.rsqrt(), 0)[:, None, :, None]
