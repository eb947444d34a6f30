"""polar on the CUDA kernels of lipfast._C: one block of threads for each small matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast import backends

_MAX_SHARED_BYTES = 200 * 1024


def can_run(matrix: Tensor, *, planar: bool = False, ridge: bool = False) -> str | None:
    """Return why these kernels cannot compute the polar factor of matrix, or None.

    Args:
        matrix: (..., m, n), or (..., 2, m, n) with planar=True.
        ridge: whether min(m, n) columns are appended to the wide form.
    """
    reason = backends.cuda_can_run(matrix)
    if reason is not None:
        return reason
    if matrix.dtype in (torch.float64, torch.complex128):
        return f"it computes in float32, and matrix has {str(matrix.dtype).removeprefix('torch.')}"
    rows, columns = sorted(matrix.shape[-2:])
    planes = 2 if planar or matrix.is_complex() else 1
    limit = _shared_limit(matrix.device.index)
    return size_can_run(planes, rows, columns + rows * ridge, limit)


@torch.compiler.assume_constant_result  # torch.compile cannot trace the extension
def _shared_limit(device: int) -> int:
    limit: int = backends.extension().polar_shared_limit(device)
    return limit


@torch.compiler.assume_constant_result
def size_can_run(
    planes: int, rows: int, columns: int, limit: int = _MAX_SHARED_BYTES
) -> str | None:
    """Return why a matrix (P, m, n), m <= n, does not fit a block with so many bytes, or None."""
    extension = backends.extension()
    if rows > extension.polar_max_rows:
        return f"it takes up to {extension.polar_max_rows} rows, and matrix has {rows}"
    needed = extension.polar_shared_bytes(planes, rows, columns)
    limit = min(limit, _MAX_SHARED_BYTES)
    if needed > limit:
        return (
            f"a matrix of {rows} x {columns} needs {needed} bytes of shared memory, and a block "
            f"may have {limit}"
        )
    return None


def polar_forward(
    x: Tensor, schedule: Sequence[tuple[float, float, float]]
) -> tuple[Tensor, Tensor]:
    """Return the polar factor of x, and how far from it the last step began.

    Args:
        x: (B, P, m, n), float32, contiguous, m <= n; P = 1 real, 2 real and imaginary part.
        schedule: at most 16 steps (a, b, c): X <- a X + (b S + c S^2) X with S = X X^H.

    Returns:
        W (B, P, m, n), and the Frobenius norm of I - S at the last step, (B,).
    """
    w, residual = torch.empty_like(x), x.new_empty(len(x))
    if x.numel() == 0:
        return w, residual.zero_()
    _run("polar_forward_cuda", x, None, w, residual, len(schedule), schedule)
    return w, residual


def polar_backward(grad: Tensor, x: Tensor, w: Tensor, steps: int) -> Tensor:
    """Return dL/dx from grad = dL/dW, by conjugate gradients on H L + L H = G W^H - W G^H.

    Args:
        grad: G, as x, contiguous.
        x: as in the forward.
        w: the polar factor of x, contiguous.
        steps: of the conjugate gradients, at least 1.
    """
    out = torch.empty_like(x)
    if x.numel():
        _run("polar_backward_cuda", x, grad, w, out, steps, ())
    return out


def _run(
    function: str,
    x: Tensor,
    grad: Tensor | None,
    w: Tensor,
    out: Tensor,
    steps: int,
    schedule: Sequence[tuple[float, float, float]],
) -> None:
    extension = backends.extension()
    batch, planes, rows, columns = x.shape
    params = extension.PolarParams(
        x=x.data_ptr(),
        grad=0 if grad is None else grad.data_ptr(),
        w=w.data_ptr(),
        out=out.data_ptr(),
        batch=batch,
        planes=planes,
        rows=rows,
        columns=columns,
        steps=steps,
        schedule=list(schedule),
    )
    with torch.cuda.device(x.device):
        getattr(extension, function)(params, torch.cuda.current_stream(x.device).cuda_stream)
