"""Polar factors by the published iterations (LOT: Xu et al. 2022; BCOP: Li et al. 2019)."""

import torch
from torch import Tensor


def polar(matrix: Tensor, *, iterations: int = 10, ridge: float | Tensor = 1e-4) -> Tensor:
    """Return (V V^H + ridge I)^(-1/2) V by the coupled Newton iteration that LOT unrolls.

    Y_0 = S, Z_0 = I, T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z, with S = V V^H + ridge I divided
    by its Frobenius norm (LOT, algorithm 1). In exact arithmetic each singular value of the
    result is at most 1 after any number of steps; how close to 1 depends on the conditioning.

    Args:
        matrix: V, (..., m, n), real or complex; where m > n the adjoint problem is solved.
        iterations: number of Newton steps.
        ridge: added to the diagonal, a number or a tensor that broadcasts with (..., 1, 1).
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return polar(matrix.mH, iterations=iterations, ridge=ridge).mH
    identity = torch.eye(matrix.shape[-2], dtype=matrix.dtype, device=matrix.device)
    gram = matrix @ matrix.mH + ridge * identity
    norm = torch.linalg.matrix_norm(gram, keepdim=True) + ridge
    norm = torch.where(norm == 0, 1, norm)  # a zero matrix gives zeros
    y = gram / norm
    z = identity.expand_as(y)
    for _ in range(iterations):
        t = 1.5 * identity - 0.5 * (z @ y)
        y = y @ t
        z = t @ z
    return (z @ matrix) / norm.sqrt()


def bjorck(matrix: Tensor, *, iterations: int = 20) -> Tensor:
    """Return the polar factor of `matrix` by Bjorck-Bowie steps A <- 1.5 A - 0.5 A A^H A.

    Singular values must be at most sqrt(3) on entry (Bjorck and Bowie 1971; BCOP, section 4);
    those at most 1 stay at most 1 after any number of steps.

    Args:
        matrix: (..., m, n), real or complex.
        iterations: number of steps.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return bjorck(matrix.mH, iterations=iterations).mH
    for _ in range(iterations):
        matrix = 1.5 * matrix - 0.5 * (matrix @ matrix.mH) @ matrix
    return matrix
