"""The Cayley transform of a rectangular matrix (Trockman and Kolter 2021)."""

import torch
from torch import Tensor


def cayley(matrix: Tensor) -> Tensor:
    """Return [(I + A)^(-1) (I - A); -2 V (I + A)^(-1)] for `matrix` = [U; V].

    A = U - U^H + V^H V, so that the result has orthonormal columns (Trockman and Kolter 2021,
    appendix C); where there are more columns than rows the adjoint problem is solved and the rows
    are orthonormal. I + A is never singular: the real part of its numerical range is at least 1.

    Args:
        matrix: (..., m, n), real or complex.
    """
    m, n = matrix.shape[-2:]
    if n > m:
        return cayley(matrix.mH).mH
    identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    u = matrix[..., :n, :]
    skew = u - u.mH
    if m == n:
        inverse, _ = torch.linalg.inv_ex(identity + skew)
        return inverse @ (identity - skew)
    v = matrix[..., n:, :]
    skew = skew + v.mH @ v
    inverse, _ = torch.linalg.inv_ex(identity + skew)
    return torch.cat([inverse @ (identity - skew), -2 * (v @ inverse)], dim=-2)
