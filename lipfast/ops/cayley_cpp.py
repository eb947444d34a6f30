"""The Cayley transform on the CPU: inverses, and the products of small matrices, by lipfast._C."""

from typing import Any

import torch
from torch import Tensor

from lipfast import backends

from . import cayley_lu
from .cayley_lu import adjoint_times, times

# Up to this many columns a matrix stays in the caches from the first product to the last; above,
# torch's products are faster. Measured by bench/bench_cayley.py.
_BACKWARD = 64


def cayley_forward(matrix: Tensor) -> Tensor:
    """As `cayley_lu.cayley_forward`, by Gauss-Jordan elimination with row pivots."""
    m, n = matrix.shape[-2:]
    matrix = matrix.contiguous()
    v = matrix[:, :, n:]
    gram = adjoint_times(v, v).contiguous() if m > n else None
    out = torch.empty_like(matrix)
    backends.extension().cayley_forward_cpu(_params(matrix, gram, out))
    square = out[:, :, :n]
    if m > n:
        torch.neg(times(v, square), out=out[:, :, n:])
    square[:, 0].diagonal(dim1=-2, dim2=-1).sub_(1)
    return out


def cayley_backward(grad: Tensor, matrix: Tensor | None, out: Tensor) -> Tensor:
    """As `cayley_lu.cayley_backward`."""
    if matrix is not None or out.shape[-1] > _BACKWARD:
        return cayley_lu.cayley_backward(grad, matrix, out)
    out, grad = out.contiguous(), grad.contiguous()
    result = torch.empty_like(out)
    backends.extension().cayley_backward_cpu(_params(out, grad, result))
    return result


def _params(matrix: Tensor, other: Tensor | None, out: Tensor) -> Any:
    batch, parts, rows, n = matrix.shape
    return backends.extension().CayleyParams(
        matrix=matrix.data_ptr(),
        other=0 if other is None else other.data_ptr(),
        out=out.data_ptr(),
        batch=batch,
        rows=rows,
        n=n,
        parts=parts,
        is_double=matrix.dtype == torch.float64,
    )
