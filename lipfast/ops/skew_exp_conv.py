"""skew_exp on torch's convolutions, arranged so that every term costs one pass over the map."""

import torch
from torch import Tensor

from lipfast.reference import conv2d_same


def skew_exp_forward(
    x: Tensor,
    kernel: Tensor,
    ratios: tuple[float, ...],
    a0: float,
    padding_mode: str,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y = a_0 z_0 with z_n = x, z_{k-1} = x + r_k L z_k, and z_1, ..., z_n.

    Args:
        x: (N, c, h, w), contiguous or channels-last.
        kernel: (c, c, kh, kw); its dtype is that of the convolutions and of the terms.
        ratios: r_1, ..., r_n.
        padding_mode: "zeros" or "circular".
        keep: return the terms; without it their first axis is empty.

    Returns:
        y, dtype and memory format of x, and the terms (n, N, c, h, w), each in that format.
    """
    terms = new_terms(x, len(ratios) if keep else 0, kernel.dtype)
    z = x.to(kernel.dtype)
    if keep:
        terms[-1].copy_(z)
    for k in reversed(range(len(ratios))):
        image = conv2d_same(z, kernel, None, padding_mode)
        if k == 0:
            out = torch.empty_like(x)
        else:
            out = terms[k - 1] if keep else image
        z = torch.add(x, image, alpha=ratios[k], out=out)
    return (z if a0 == 1 else z.mul_(a0)), terms


def skew_exp_backward(
    grad: Tensor,
    kernel: Tensor,
    ratios: tuple[float, ...],
    a0: float,
    padding_mode: str,
) -> tuple[Tensor, Tensor]:
    """Return p(-L) grad = sum_k h_k and t_k = r_k h_{k-1}, with h_0 = a_0 grad, h_k = -L t_k.

    The derivative with respect to the kernel is that of sum_k <L z_k, t_k>. Shapes and dtypes as in
    `skew_exp_forward`.
    """
    scaled = new_terms(grad, len(ratios), kernel.dtype)
    turned = -kernel
    total = grad * a0
    h = total
    for term, ratio in zip(scaled, ratios, strict=True):
        torch.mul(h, ratio, out=term)
        h = conv2d_same(term, turned, None, padding_mode)
        total.add_(h)
    return total, scaled


def new_terms(x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised (count, *x.shape), each entry in the memory format of x."""
    contiguous = x.is_contiguous()
    layout = torch.contiguous_format if contiguous else torch.channels_last
    n, *rest = x.shape
    stacked = torch.empty((count * n, *rest), dtype=dtype, device=x.device, memory_format=layout)
    return stacked.view(count, n, *rest)
