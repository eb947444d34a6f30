"""MaxMin pair by pair, in float64, as the kernels are tested against it."""

import torch
from torch import Tensor


def definition(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The value for x, and the gradient that the swaps of x make of grad."""
    y, out = x.double().clone(), grad.clone()
    for i in range(0, x.shape[1] - 1, 2):
        a, b = x[:, i].double(), x[:, i + 1].double()
        y[:, i], y[:, i + 1] = torch.maximum(a, b), torch.minimum(a, b)
        out[:, i] = torch.where(b > a, grad[:, i + 1], grad[:, i])
        out[:, i + 1] = torch.where(b > a, grad[:, i], grad[:, i + 1])
    return y, out
