"""Products M X of the polar factor in Triton, with M = b S + c S2 formed while loading.

Matrices are (B, P, m, n) float32, contiguous: P = 1 real, P = 2 real and imaginary part. Every
operand is read along the axis that is summed over, as tensor cores read TF32:
X comes turned, (B, P, n, m).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DEPTH = 16  # numbers of the summed axis that one step of a product reads
STAGES = 3  # of the pipeline of such steps


def multiply(
    s: Tensor | None,
    s2: Tensor | None,
    turned: Tensor,
    coefficients: tuple[float, float, float],
    precision: str,
    *,
    add: Tensor | None = None,
    factors: Tensor | None = None,
    out: Tensor,
    out_turned: Tensor | None = None,
) -> None:
    """Write out = a D + (b S + c S2) X, and its transpose without conjugation.

    Args:
        s, s2: (B, P, m, m); s2 None for c = 0.
        turned: X turned, (B, P, n, m); not written.
        coefficients: (a, b, c).
        add: D, (B, P, m, n), or None for zero; may be `out`.
        factors: (B, 3), multiplied into (a, b, c), or None for ones.
        out: (B, P, m, n), written.
        out_turned: (B, P, n, m), written, or None.
    """
    batch, planes, columns, rows = turned.shape
    tile = tile_size(rows, planes, precision, generation(turned))
    programs = triton.cdiv(rows, tile) * triton.cdiv(columns, tile)
    polar_multiply_kernel[(batch * programs,)](
        s,
        s if s2 is None else s2,
        turned,
        out if add is None else add,
        turned if factors is None else factors,
        out,
        out if out_turned is None else out_turned,
        *coefficients,
        rows,
        columns,
        PLANES=planes,
        SQUARE=s2 is not None,
        ADD=add is not None,
        SCALED=factors is not None,
        TURN=out_turned is not None,
        TILE=tile,
        DEPTH=DEPTH,
        PRECISION=precision,
        num_warps=warps(tile),
        num_stages=STAGES,
    )


def default_precision() -> str:
    """Return "tf32" where torch multiplies float32 matrices so on a GPU, else "ieee"."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def tile_size(rows: int, planes: int, precision: str, generation: int) -> int:
    """Return the side of the tiles that one program computes, on GPUs of this generation."""
    # An Ampere GPU holds operands in registers, in two parts for "tf32x3": larger tiles spill.
    if rows <= 32 or (generation < 9 and planes == 2 and precision == "tf32x3"):
        return 32
    return 128 if rows >= 256 and planes == 1 and precision == "tf32" else 64


def generation(x: Tensor) -> int:
    """Return the major compute capability of the GPU that x is on."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def warps(tile: int) -> int:
    """Return how many warps compute a tile."""
    return 4 if tile == 32 else 8


@triton.jit
def polar_multiply_kernel(
    s,
    s2,
    turned,
    add,
    factors,
    out,
    out_turned,
    a,
    b,
    c,
    rows,
    columns,
    PLANES: tl.constexpr,
    SQUARE: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    TURN: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    down, across = tl.cdiv(rows, TILE), tl.cdiv(columns, TILE)
    batch = (tl.program_id(0) // (down * across)).to(tl.int64)
    program = tl.program_id(0) % (down * across)
    # Places in a tile are 32-bit numbers, what they are added to is not.
    above, before = program // across * TILE, program % across * TILE
    i, j = above + tl.arange(0, TILE), before + tl.arange(0, TILE)
    above, before = above.to(tl.int64), before.to(tl.int64)
    if SCALED:
        a *= tl.load(factors + batch * 3)
        b *= tl.load(factors + batch * 3 + 1)
        c *= tl.load(factors + batch * 3 + 2)
    square, plane = tl.cast(rows, tl.int64) * rows, tl.cast(rows, tl.int64) * columns
    s += batch * PLANES * square + above * rows
    s2 += batch * PLANES * square + above * rows
    turned += batch * PLANES * plane + before * rows
    k = tl.arange(0, DEPTH)
    at = tl.arange(0, TILE)[:, None] * rows + k[None, :]
    re = tl.zeros((TILE, TILE), tl.float32)
    im = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, rows, DEPTH):
        deep = (k < rows - start)[None, :]
        in_m, in_x = (i < rows)[:, None] & deep, (j < columns)[:, None] & deep
        m_re = b * tl.load(s + start + at, mask=in_m, other=0.0)
        if SQUARE:
            m_re += c * tl.load(s2 + start + at, mask=in_m, other=0.0)
        x_re = tl.load(turned + start + at, mask=in_x, other=0.0)
        re = tl.dot(m_re, tl.trans(x_re), re, input_precision=PRECISION)
        if PLANES == 2:
            m_im = b * tl.load(s + square + start + at, mask=in_m, other=0.0)
            if SQUARE:
                m_im += c * tl.load(s2 + square + start + at, mask=in_m, other=0.0)
            x_im = tl.load(turned + plane + start + at, mask=in_x, other=0.0)
            re = tl.dot(-m_im, tl.trans(x_im), re, input_precision=PRECISION)
            im = tl.dot(m_re, tl.trans(x_im), im, input_precision=PRECISION)
            im = tl.dot(m_im, tl.trans(x_re), im, input_precision=PRECISION)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    here = batch * PLANES * plane + above * columns + before
    there = batch * PLANES * plane + before * rows + above
    at = tl.arange(0, TILE)[:, None] * columns + tl.arange(0, TILE)[None, :]
    at_turned = tl.arange(0, TILE)[:, None] * rows + tl.arange(0, TILE)[None, :]
    inside_turned = (j < columns)[:, None] & (i < rows)[None, :]
    if ADD:
        re += a * tl.load(add + here + at, mask=inside, other=0.0)
    tl.store(out + here + at, re, mask=inside)
    if TURN:
        tl.store(out_turned + there + at_turned, tl.trans(re), mask=inside_turned)
    if PLANES == 2:
        if ADD:
            im += a * tl.load(add + plane + here + at, mask=inside, other=0.0)
        tl.store(out + plane + here + at, im, mask=inside)
        if TURN:
            tl.store(out_turned + plane + there + at_turned, tl.trans(im), mask=inside_turned)
