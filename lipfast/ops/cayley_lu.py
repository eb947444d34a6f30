"""The Cayley transform by LU factors, and its derivative from the result; planar, in PyTorch."""

import torch
from torch import Tensor


def cayley_forward(matrix: Tensor) -> Tensor:
    """Return [2 Z - I; -2 V Z], Z = (I + U - U^H + V^H V)^(-1), for the matrix [U; V].

    It has the shape (batch, P, m, n), m >= n; P is 1 for a real matrix, 2 for real and imaginary
    parts.
    """
    batch, parts, m, n = matrix.shape
    u, v = matrix[:, :, :n], matrix[:, :, n:]
    sums = matrix.new_empty(batch, n, n, parts)  # I + A, complex numbers in neighbours
    torch.sub(u[:, 0], u[:, 0].mT, out=sums[..., 0])
    if parts == 2:
        torch.add(u[:, 1], u[:, 1].mT, out=sums[..., 1])
    if m > n:
        sums += adjoint_times(v, v).movedim(1, -1)
    sums[..., 0].diagonal(dim1=-2, dim2=-1).add_(1)
    # LAPACK's matrices are stored by columns: the transpose of one stored by rows needs no copy.
    if parts == 2:
        inverse = torch.view_as_real(_inverse(torch.view_as_complex(sums).mT).mT)
    else:
        inverse = _inverse(sums[..., 0].mT).mT[..., None]
    out = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    square = out[:, :, :n]
    torch.mul(inverse.movedim(-1, 1), 2, out=square)
    if m > n:
        torch.neg(times(v, square), out=out[:, :, n:])
    square[:, 0].diagonal(dim1=-2, dim2=-1).sub_(1)
    return out


def cayley_backward(grad: Tensor, matrix: Tensor | None, out: Tensor) -> Tensor:
    """Return dL/dmatrix from dL/dout; a square matrix itself is not needed."""
    n = out.shape[-1]
    square, upper, lower = out[:, :, :n], grad[:, :, :n], grad[:, :, n:]
    if matrix is not None:
        v = matrix[:, :, n:]
        upper = upper - adjoint_times(v, lower)
    # 2 Z = W + I, and inner = -2 dL/dA = (2 Z)^H upper (2 Z)^H
    inner = adjoint_times(square, upper).add_(upper)
    inner = times_adjoint(inner, square).add_(inner)
    result = torch.empty_like(out, memory_format=torch.contiguous_format)
    skew = result[:, :, :n]
    torch.sub(inner[:, 0].mT, inner[:, 0], out=skew[:, 0])
    if out.shape[1] == 2:
        torch.add(inner[:, 1].mT, inner[:, 1], out=skew[:, 1]).neg_()
    skew.mul_(0.5)
    if matrix is not None:
        # V (dL/dA + (dL/dA)^H) = -V (inner + skew)
        both = times(v, inner + skew).add_(times_adjoint(lower, square)).add_(lower)
        torch.neg(both, out=result[:, :, n:])
    return result


def cayley_differentiable(grad: Tensor, matrix: Tensor | None, out: Tensor) -> Tensor:
    """`cayley_backward` by operations that can be differentiated, on complex numbers."""
    n = out.shape[-1]
    planar = out.shape[1] == 2
    values = [None if t is None else _joined(t) for t in (grad, matrix, out)]
    grad, matrix, out = values  # type: ignore[assignment]
    twice = out[:, :n] + torch.eye(n, dtype=out.dtype, device=out.device)
    upper, lower = grad[:, :n], grad[:, n:]
    if matrix is not None:
        upper = upper - matrix[:, n:].mH @ lower
    inner = twice.mH @ upper @ twice.mH
    skew = (inner.mH - inner) / 2
    result = skew
    if matrix is not None:
        below = -(matrix[:, n:] @ (inner + skew) + lower @ twice.mH)
        result = torch.cat([skew, below], dim=1)
    return torch.stack([result.real, result.imag], dim=1) if planar else result[:, None]


def _joined(matrix: Tensor) -> Tensor:
    """(batch, m, n), complex where there are two parts."""
    return torch.complex(*matrix.unbind(1)) if matrix.shape[1] == 2 else matrix[:, 0]


def _inverse(matrix: Tensor) -> Tensor:
    return torch.linalg.inv_ex(matrix)[0]


def adjoint(matrix: Tensor) -> Tensor:
    """The conjugate transpose; a view of a real matrix."""
    if matrix.shape[1] == 1:
        return matrix.mT
    return torch.stack([matrix[:, 0].mT, -matrix[:, 1].mT], dim=1)


def times(a: Tensor, b: Tensor) -> Tensor:
    """a b, of matrices (batch, P, m, k) and (batch, P, k, n)."""
    return _product(a, b, 1, 1)


def times_adjoint(a: Tensor, b: Tensor) -> Tensor:
    """a b^H."""
    return _product(a, b.mT, 1, -1)


def adjoint_times(a: Tensor, b: Tensor) -> Tensor:
    """a^H b."""
    return _product(a.mT, b, -1, 1)


def _product(a: Tensor, b: Tensor, sign_a: int, sign_b: int) -> Tensor:
    """a b, with the imaginary parts of a and b multiplied by signs."""
    parts = a.shape[1]
    out = a.new_empty(parts, len(a), a.shape[2], b.shape[3])  # LAPACK and BLAS write whole batches
    torch.bmm(a[:, 0], b[:, 0], out=out[0])
    if parts == 2:
        out[0].baddbmm_(a[:, 1], b[:, 1], alpha=-sign_a * sign_b)
        torch.bmm(a[:, 0], b[:, 1], out=out[1])
        out[1].baddbmm_(a[:, 1], b[:, 0], beta=sign_b, alpha=sign_a)
    return out.transpose(0, 1)
