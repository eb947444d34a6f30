"""Row sums of a convolution's Gram operator (Prach and Lampert 2022; Araujo et al. 2023)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gram_bound(weight: Tensor, q: Tensor | None = None, *, axis: str = "in") -> Tensor:
    """Return r_i = sum_j sum_delta |G_delta|_ij q_j / q_i, G the self-correlation of `weight`.

    For any q > 0, diag(r) - G is positive semi-definite, so that a convolution with `weight`
    scaled by r^(-1/2) along `axis` has spectral norm at most 1 under zero and circular padding
    on maps of any size (AOL, theorem 2; SLL, theorem 3).

    Args:
        weight: (out, in, kh, kw), real.
        q: positive weights of length in (`axis="in"`) or out (`axis="out"`); ones by default.
        axis: "in" correlates the input channels (AOL), "out" the output channels (SLL).

    Returns:
        r, of length in or out, with the dtype of `weight`.
    """
    filters = weight.transpose(0, 1) if axis == "in" else weight
    kh, kw = filters.shape[-2:]
    gram = F.conv2d(filters, filters, padding=(kh - 1, kw - 1)).abs().sum(dim=(2, 3))
    if q is None:
        return gram.sum(dim=1)
    return (gram @ q) / q


def aol_rescale(weight: Tensor, *, epsilon: float | Tensor = 1e-6) -> Tensor:
    """Return d_i = (r_i + epsilon)^(-1/2), 0 where that is infinite (AOL, theorem 2).

    `weight` (out, in, kh, kw) scaled by d along the input channels has spectral norm at most 1.
    """
    return inverse_or_zero(gram_bound(weight) + epsilon, power=0.5)


def inverse_or_zero(value: Tensor, *, power: float = 1.0) -> Tensor:
    """Return value^(-power), and 0 with a zero gradient where `value` is not positive."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1) ** -power, 0)
