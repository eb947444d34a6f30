"""The Cayley transform by LU factors, and its derivative from the result; planar, in PyTorch."""

import torch
from torch import Tensor


def cayley_forward(matrix: Tensor) -> Tensor:
    """Return [2 Z - I; -2 V Z], Z = (I + U - U^H + V^H V)^(-1), for the matrix [U; V].

    It has the shape (batch, P, m, n), m >= n; P is 1 for a real matrix, 2 for real and imaginary
    parts.
    """
    n = matrix.shape[-1]
    u, v = matrix[:, :, :n], matrix[:, :, n:]
    sums = u - adjoint(u)
    if v.shape[2]:
        sums += product(adjoint(v), v)
    sums[:, 0].diagonal(dim1=-2, dim2=-1).add_(1)
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    square = out[:, :, :n]
    if matrix.shape[1] == 1:
        torch.mul(_inverse(sums[:, 0]), 2, out=square[:, 0])
    else:
        inverse = _inverse(torch.complex(sums[:, 0], sums[:, 1]))
        torch.mul(torch.view_as_real(inverse).movedim(-1, 1), 2, out=square)
    if v.shape[2]:
        torch.neg(product(v, square), out=out[:, :, n:])
    square[:, 0].diagonal(dim1=-2, dim2=-1).sub_(1)
    return out


def cayley_backward(grad: Tensor, matrix: Tensor | None, out: Tensor) -> Tensor:
    """Return dL/dmatrix from dL/dout; of a square matrix, only out is needed."""
    n = out.shape[-1]
    twice = out[:, :, :n].clone()  # 2 Z
    twice[:, 0].diagonal(dim1=-2, dim2=-1).add_(1)
    twice = adjoint(twice)
    upper, lower = grad[:, :, :n], grad[:, :, n:]
    if matrix is not None:
        v = matrix[:, :, n:]
        upper = upper - product(adjoint(v), lower)
    inner = product(product(twice, upper), twice).mul_(-0.5)  # dL/dA
    if matrix is None:
        return inner - adjoint(inner)
    result = torch.empty_like(out)
    torch.sub(inner, adjoint(inner), out=result[:, :, :n])
    both = product(v, inner + adjoint(inner))
    torch.sub(both, product(lower, twice), out=result[:, :, n:])
    return result


def _inverse(matrix: Tensor) -> Tensor:
    # LAPACK's matrices are stored by columns: that of the transpose is stored as this one is.
    return torch.linalg.inv_ex(matrix.mT)[0].mT


def adjoint(matrix: Tensor) -> Tensor:
    """The conjugate transpose; a view of a real matrix."""
    if matrix.shape[1] == 1:
        return matrix.mT
    return torch.stack([matrix[:, 0].mT, -matrix[:, 1].mT], dim=1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices (batch, P, m, k) and (batch, P, k, n)."""
    if a.shape[1] == 1:
        return a @ b
    out = a.new_empty(2, len(a), a.shape[2], b.shape[3])
    torch.bmm(a[:, 0], b[:, 0], out=out[0]).baddbmm_(a[:, 1], b[:, 1], alpha=-1)
    torch.bmm(a[:, 0], b[:, 1], out=out[1]).baddbmm_(a[:, 1], b[:, 0])
    return out.transpose(0, 1)
