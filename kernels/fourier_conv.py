"""Products of fourier_conv with one complex matrix for each frequency, in Triton, planar."""

import triton
import triton.language as tl
from torch import Tensor

from .gram_bound import _precision
from .launch import on_its_gpu

Parts = tuple[Tensor, Tensor]  # real and imaginary, (F, rows, columns) with contiguous matrices


@on_its_gpu
def multiply(x_hat: Tensor, matrices: Parts) -> Tensor:
    """Return x_hat matrices^T, (2, F, n, out) from (2, F, n, in) and two of (F, out, in)."""
    return _product(x_hat.unbind(), matrices, conjugate=False)


@on_its_gpu
def multiply_adjoint(y_hat: Tensor, matrices: Parts) -> Tensor:
    """Return y_hat conj(matrices), (2, F, n, in) from (2, F, n, out) and two of (F, out, in)."""
    real, imaginary = matrices
    return _product(y_hat.unbind(), (real.mT, imaginary.mT), conjugate=True)


@on_its_gpu
def correlate(y_hat: Tensor, x_hat: Tensor) -> Tensor:
    """Return y_hat^T conj(x_hat), (2, F, out, in) from (2, F, n, out) and (2, F, n, in)."""
    return _product(y_hat.mT.unbind(), x_hat.mT.unbind(), conjugate=True)


def _product(a: tuple[Tensor, ...], b: tuple[Tensor, ...], *, conjugate: bool) -> Tensor:
    """a b^T, (2, F, m, n), or a b^H, from parts (F, m, depth) and (F, n, depth)."""
    # Tensor cores read TF32 operands along the dimension that is summed over.
    a, b = (tuple(map(_with_contiguous_rows, parts)) for parts in (a, b))
    frequencies, m, depth = a[0].shape
    n = b[0].shape[1]
    out = a[0].new_empty(2, frequencies, m, n)
    rows, columns, precision = _tile(m), _tile(n), _precision()
    programs = triton.cdiv(m, rows) * triton.cdiv(n, columns) * frequencies
    planar_product_kernel[(programs,)](
        *a,
        *b,
        *out.unbind(),
        m,
        n,
        depth,
        a[0].stride(0),
        b[0].stride(0),
        ROWS=rows,
        COLUMNS=columns,
        CONJUGATE=conjugate,
        PRECISION=precision,
        **_schedule(rows, columns, precision),
    )
    return out


def _with_contiguous_rows(part: Tensor) -> Tensor:
    return part if part[0].is_contiguous() else part.contiguous()


def _tile(size: int) -> int:
    return 64 if size > 32 else 32 if size > 16 else 16


def _schedule(rows: int, columns: int, precision: str) -> dict[str, int]:
    if precision == "tf32":
        return {"DEPTH": 32, "num_warps": 4, "num_stages": 3}
    # without tensor cores a thread holds its operands in registers
    return {"DEPTH": 16, "num_warps": 8 if rows * columns == 64 * 64 else 4, "num_stages": 3}


@triton.jit
def planar_product_kernel(
    a_real,
    a_imaginary,
    b_real,
    b_imaginary,
    out_real,
    out_imaginary,
    m,
    n,
    depth,
    a_stride,
    b_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CONJUGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.cdiv(n, COLUMNS)
    tiles = tl.cdiv(m, ROWS) * columns
    frequency = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    i = (tile // columns) * ROWS + tl.arange(0, ROWS)
    j = (tile % columns) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    a_place = frequency * a_stride + i.to(tl.int64)[:, None] * depth + k[None, :]
    b_place = frequency * b_stride + j.to(tl.int64)[:, None] * depth + k[None, :]
    real = tl.zeros((ROWS, COLUMNS), tl.float32)
    imaginary = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        deep = (k < depth - start)[None, :]
        a_mask, b_mask = (i < m)[:, None] & deep, (j < n)[:, None] & deep
        ar = tl.load(a_real + start + a_place, mask=a_mask, other=0)
        ai = tl.load(a_imaginary + start + a_place, mask=a_mask, other=0)
        br = tl.trans(tl.load(b_real + start + b_place, mask=b_mask, other=0))
        bi = tl.trans(tl.load(b_imaginary + start + b_place, mask=b_mask, other=0))
        real = tl.dot(ar, br, real, input_precision=PRECISION)
        imaginary = tl.dot(ai, br, imaginary, input_precision=PRECISION)
        if CONJUGATE:
            real = tl.dot(ai, bi, real, input_precision=PRECISION)
            imaginary = tl.dot(-ar, bi, imaginary, input_precision=PRECISION)
        else:
            real = tl.dot(-ai, bi, real, input_precision=PRECISION)
            imaginary = tl.dot(ar, bi, imaginary, input_precision=PRECISION)
    place = (frequency * m + i.to(tl.int64)[:, None]) * n + j[None, :]
    mask = (i < m)[:, None] & (j < n)[None, :]
    tl.store(out_real + place, real, mask=mask)
    tl.store(out_imaginary + place, imaginary, mask=mask)
