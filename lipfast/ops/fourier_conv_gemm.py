"""Products with one complex matrix for each frequency, as real products of planar parts."""

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor]  # real and imaginary


def multiply(x_hat: Tensor, matrices: Parts) -> Tensor:
    """Return x_hat matrices^T, (2, F, n, out) from (2, F, n, in) and two of (F, out, in)."""
    real, imaginary = (part.mT for part in matrices)
    y_hat = x_hat.new_empty(*x_hat.shape[:3], real.shape[-1])
    torch.bmm(x_hat[0], real, out=y_hat[0]).baddbmm_(x_hat[1], imaginary, alpha=-1)
    torch.bmm(x_hat[0], imaginary, out=y_hat[1]).baddbmm_(x_hat[1], real)
    return y_hat


def multiply_adjoint(y_hat: Tensor, matrices: Parts) -> Tensor:
    """Return y_hat conj(matrices), (2, F, n, in) from (2, F, n, out) and two of (F, out, in)."""
    real, imaginary = matrices
    x_hat = y_hat.new_empty(*y_hat.shape[:3], real.shape[-1])
    torch.bmm(y_hat[0], real, out=x_hat[0]).baddbmm_(y_hat[1], imaginary)
    torch.bmm(y_hat[1], real, out=x_hat[1]).baddbmm_(y_hat[0], imaginary, alpha=-1)
    return x_hat


def correlate(y_hat: Tensor, x_hat: Tensor) -> Tensor:
    """Return y_hat^T conj(x_hat), (2, F, out, in) from (2, F, n, out) and (2, F, n, in)."""
    real, imaginary = y_hat.mT
    matrices = x_hat.new_empty(2, x_hat.shape[1], real.shape[1], x_hat.shape[-1])
    torch.bmm(real, x_hat[0], out=matrices[0]).baddbmm_(imaginary, x_hat[1])
    torch.bmm(imaginary, x_hat[0], out=matrices[1]).baddbmm_(real, x_hat[1], alpha=-1)
    return matrices
