"""Products that equal their adjoint, or its opposite, in Triton: one triangle, mirrored.

Matrices are (B, P, m, n) float32, contiguous: P = 1 real, P = 2 real and imaginary part. Every
operand is read along the axis that is summed over, as tensor cores read TF32.
"""

import triton
import triton.language as tl
from torch import Tensor

from lipfast.kernels.polar_multiply import DEPTH, STAGES, generation, tile_size, warps


def gram(x: Tensor, out: Tensor, precision: str, *, reduce: str = "none") -> Tensor:
    """Write out = X X^H, or X X^H - I, (B, P, m, m), one triangle of tiles, mirrored.

    Args:
        x: (B, P, m, k).
        out: written.
        precision: of the products: "tf32", "tf32x3" or "ieee".
        reduce: "none": return nothing of use; "norms": return (B, 2, tiles, m), the sums of |out|
            and of |out|^2 over the columns of each tile; "defect": out = X X^H - I, and return
            (B, programs), sums of |out|^2.
    """
    return _adjoint_product(x, x, out, precision, two=False, reduce=reduce, skew=0)


def two_sided(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    precision: str,
    *,
    skew: int,
    scale: Tensor | None = None,
    reduce: str = "none",
) -> Tensor:
    """Write out = s (A B^H + B A^H), or s (A B^H - B A^H) for the first `skew` matrices.

    Args:
        left: A, (B, P, m, k).
        right: B, (B', P, m, k): matrix b of the left meets matrix b mod B'.
        out: (B, P, m, m), written.
        scale: s, (B,), or None for 1.
        reduce: "none": return nothing of use; "inner": return (B, 2, programs), sums of |A|^2
            and of Re(conj(A) out), for A as square and as symmetric as out.
    """
    return _adjoint_product(
        left, right, out, precision, two=True, reduce=reduce, skew=skew, scale=scale
    )


def _adjoint_product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    precision: str,
    *,
    two: bool,
    reduce: str,
    skew: int,
    scale: Tensor | None = None,
) -> Tensor:
    batch, planes, rows, depth = left.shape
    tile = tile_size(rows, planes, precision, generation(left))
    tiles = triton.cdiv(rows, tile)
    programs = tiles * (tiles // 2 + 1)
    shapes = {"none": (0,), "norms": (batch, 2, tiles, rows), "defect": (batch, programs)}
    partial = left.new_empty(shapes.get(reduce, (batch, 2, programs)))
    polar_adjoint_kernel[(batch * programs,)](
        left,
        right,
        out if scale is None else scale,
        out,
        partial,
        rows,
        depth,
        len(right),
        skew,
        PLANES=planes,
        TWO=two,
        SCALED=scale is not None,
        REDUCE=reduce,
        TILE=tile,
        DEPTH=DEPTH,
        PRECISION=precision,
        num_warps=warps(tile),
        num_stages=STAGES,
    )
    return partial


@triton.jit
def polar_adjoint_kernel(
    left,
    right,
    scale,
    out,
    partial,
    rows,
    depth,
    right_count,
    skew,
    PLANES: tl.constexpr,
    TWO: tl.constexpr,
    SCALED: tl.constexpr,
    REDUCE: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(rows, TILE)
    # Tile (row, row + distance mod tiles) for distances up to half: each pair of tile rows once,
    # but twice at distance tiles / 2, where the second half of the rows has nothing to do.
    programs = tiles * (tiles // 2 + 1)
    batch, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    row, distance = program % tiles, program // tiles
    column = (row + distance) % tiles
    twice = (2 * distance == tiles) & (2 * row >= tiles)
    if twice:
        if REDUCE == "defect":
            tl.store(partial + batch * programs + program, 0.0)
        if REDUCE == "inner":
            tl.store(partial + batch * 2 * programs + program, 0.0)
            tl.store(partial + (batch * 2 + 1) * programs + program, 0.0)
    else:
        # Places in a tile are 32-bit numbers, what they are added to is not.
        i, j = row * TILE + tl.arange(0, TILE), column * TILE + tl.arange(0, TILE)
        above, before = (row * TILE).to(tl.int64), (column * TILE).to(tl.int64)
        plane = tl.cast(rows, tl.int64) * depth
        a = left + batch * PLANES * plane
        b = right + (batch % right_count) * PLANES * plane
        down, across = above * depth, before * depth
        re = tl.zeros((TILE, TILE), tl.float32)
        im = tl.zeros((TILE, TILE), tl.float32)
        re, im = _product(
            a + down,
            b + across,
            i < rows,
            j < rows,
            depth,
            plane,
            re,
            im,
            PLANES,
            TILE,
            DEPTH,
            PRECISION,
        )
        sign = tl.where(batch < skew, -1.0, 1.0)
        if TWO:
            re, im = sign * re, sign * im
            re, im = _product(
                b + down,
                a + across,
                i < rows,
                j < rows,
                depth,
                plane,
                re,
                im,
                PLANES,
                TILE,
                DEPTH,
                PRECISION,
            )
            re, im = sign * re, sign * im
        if SCALED:
            factor = tl.load(scale + batch)
            re, im = factor * re, factor * im
        inside = (i < rows)[:, None] & (j < rows)[None, :]
        if REDUCE == "defect":
            re = tl.where((i[:, None] == j[None, :]) & inside, re - 1.0, re)
        square = tl.cast(rows, tl.int64) * rows
        here = out + batch * PLANES * square + above * rows + before
        mirrored = out + batch * PLANES * square + before * rows + above
        at = tl.arange(0, TILE)[:, None] * rows + tl.arange(0, TILE)[None, :]
        tl.store(here + at, re, mask=inside)
        if PLANES == 2:
            tl.store(here + square + at, im, mask=inside)
        if distance > 0:
            there = (j < rows)[:, None] & (i < rows)[None, :]
            tl.store(mirrored + at, sign * tl.trans(re), mask=there)
            if PLANES == 2:
                tl.store(mirrored + square + at, -sign * tl.trans(im), mask=there)
        times = tl.where(distance > 0, 2.0, 1.0)
        if REDUCE == "norms":
            power = re * re + im * im if PLANES == 2 else re * re
            size = tl.sqrt(power) if PLANES == 2 else tl.abs(re)
            sums = partial + (batch * 2 * tiles + column) * rows + i
            tl.store(sums, tl.sum(size, axis=1), mask=i < rows)
            tl.store(sums + tiles * rows, tl.sum(power, axis=1), mask=i < rows)
            if distance > 0:
                sums = partial + (batch * 2 * tiles + row) * rows + j
                tl.store(sums, tl.sum(size, axis=0), mask=j < rows)
                tl.store(sums + tiles * rows, tl.sum(power, axis=0), mask=j < rows)
        if REDUCE == "defect":
            power = re * re + im * im if PLANES == 2 else re * re
            tl.store(partial + batch * programs + program, times * tl.sum(power))
        if REDUCE == "inner":
            a += above * rows + before
            a_tile = tl.load(a + at, mask=inside, other=0.0)
            own, both = a_tile * a_tile, a_tile * re
            if PLANES == 2:
                a_tile = tl.load(a + square + at, mask=inside, other=0.0)
                own += a_tile * a_tile
                both += a_tile * im
            sums = partial + batch * 2 * programs + program
            tl.store(sums, times * tl.sum(own))
            tl.store(sums + programs, times * tl.sum(both))


@triton.jit
def _product(
    a,
    b,
    in_a,
    in_b,
    depth,
    plane,
    re,
    im,
    PLANES: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(re, im) + A B^H for the rows of two tiles."""
    k = tl.arange(0, DEPTH)
    at = tl.arange(0, TILE)[:, None] * depth + k[None, :]
    for start in range(0, depth, DEPTH):
        deep = (k < depth - start)[None, :]
        a_inside, b_inside = in_a[:, None] & deep, in_b[:, None] & deep
        a_re = tl.load(a + start + at, mask=a_inside, other=0.0)
        b_re = tl.load(b + start + at, mask=b_inside, other=0.0)
        re = tl.dot(a_re, tl.trans(b_re), re, input_precision=PRECISION)
        if PLANES == 2:
            a_im = tl.load(a + plane + start + at, mask=a_inside, other=0.0)
            b_im = tl.load(b + plane + start + at, mask=b_inside, other=0.0)
            re = tl.dot(a_im, tl.trans(b_im), re, input_precision=PRECISION)
            im = tl.dot(a_im, tl.trans(b_re), im, input_precision=PRECISION)
            im = tl.dot(-a_re, tl.trans(b_im), im, input_precision=PRECISION)
    return re, im
