"""MaxMin by two reductions and a concatenation, as published (Anil et al. 2019)."""

import torch
from torch import Tensor


def maxmin(x: Tensor) -> Tensor:
    """Return max and min of the channels 2i and 2i + 1, in their place; an odd last one as it is.

    At a tie the gradient is that of the two reductions, which is no permutation.

    Args:
        x: (n, c, ...), real.
    """
    half = x.shape[1] // 2
    pairs = x[:, : 2 * half].reshape(x.shape[0], half, 2, *x.shape[2:])
    larger = pairs.max(dim=2, keepdim=True).values
    smaller = pairs.min(dim=2, keepdim=True).values
    ordered = torch.cat([larger, smaller], dim=2).reshape(x.shape[0], 2 * half, *x.shape[2:])
    return torch.cat([ordered, x[:, 2 * half :]], dim=1) if x.shape[1] % 2 else ordered
