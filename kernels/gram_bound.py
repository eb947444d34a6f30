"""gram_bound in Triton: correlations of taps in tiles, only their signs and row sums are stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_its_gpu

_MAX_BATCH = 65535  # of a launch: the third dimension of a grid


@on_its_gpu
def gram_bound_forward(taps: Tensor, q: Tensor, signs: Tensor) -> Tensor:
    """Return q_i r_i, and write the signs of the correlations.

    Args:
        taps: (batch, kh, kw, c, n), float32, channels to correlate before those to sum over.
        q: (batch, c), float32, contiguous.
        signs: int8 (batch, c, offsets, c), contiguous, written.

    Returns:
        sum_j sum_delta |G_delta|_ij q_j, (batch, c), float32.
    """
    batch, kh, kw, channels, depth = taps.shape
    taps = taps.contiguous()
    precision = _precision()
    tile = _tile(channels, precision, backward=False)
    tiles = triton.cdiv(channels, tile)
    offsets = signs.shape[2]
    # Sums over the columns, then over the rows, of each tile: added up in a fixed order.
    partial = taps.new_empty(batch, 2, offsets, tiles, channels)
    for start in range(0, batch, _MAX_BATCH):
        part = slice(start, start + _MAX_BATCH)
        gram_bound_forward_kernel[(tiles * tiles, offsets, len(taps[part]))](
            taps[part],
            q[part],
            signs[part],
            partial[part],
            channels,
            depth,
            kh,
            kw,
            TILE=tile,
            DEPTH=32,
            PRECISION=precision,
            num_warps=_warps(tile),
            num_stages=3,
        )
    return partial.sum(dim=(1, 2, 3))


@on_its_gpu
def gram_bound_backward(taps: Tensor, signs: Tensor, a: Tensor, q: Tensor, grad: Tensor) -> None:
    """Write dL/dtaps into grad, (batch, kh, kw, c, n) with any strides.

    Args:
        taps, signs, q: as in the forward.
        a: dL/dr / q, (batch, c), contiguous.
        grad: written.
    """
    batch, kh, kw, channels, depth = taps.shape
    # Tensor cores read TF32 operands along the dimension that is summed over: here the channels.
    turned = taps.mT.contiguous()
    precision = _precision()
    tile = _tile(channels, precision, backward=True)
    programs = triton.cdiv(channels, tile) * triton.cdiv(depth, tile)
    for start in range(0, batch, _MAX_BATCH):
        part = slice(start, start + _MAX_BATCH)
        gram_bound_backward_kernel[(programs, kh * kw, len(taps[part]))](
            turned[part],
            signs[part],
            a[part],
            q[part],
            grad[part],
            channels,
            depth,
            kh,
            kw,
            *grad.stride(),
            TILE=tile,
            DEPTH=32,
            PRECISION=precision,
            num_warps=_warps(tile),
            num_stages=3,
        )


def _tile(channels: int, precision: str, *, backward: bool) -> int:
    if precision == "ieee":
        # With larger tiles Triton computes a float32 that began as int8 in TF32 on Blackwell, as
        # the backward kernel's signs do.
        return 32 if backward or channels <= 32 else 64
    if channels <= 32:
        return 32
    return 128 if channels >= 256 else 64


def _warps(tile: int) -> int:
    return 8 if tile == 128 else 4


def _precision() -> str:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


@triton.jit
def gram_bound_forward_kernel(
    taps,
    q,
    signs,
    partial,
    channels,
    depth,
    kh,
    kw,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(channels, TILE)
    row, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    offset, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offsets = tl.num_programs(1)
    i = row * TILE + tl.arange(0, TILE)
    j = column * TILE + tl.arange(0, TILE)
    row_sums = partial + ((batch * 2 * offsets + offset) * tiles + column) * channels + i
    column_sums = partial + (((batch * 2 + 1) * offsets + offset) * tiles + row) * channels + j
    if (offset == 0) & (column < row):
        # Offset 0 is symmetric: the tile across the diagonal does the work of both.
        tl.store(row_sums, tl.zeros((TILE,), tl.float32), mask=i < channels)
        tl.store(column_sums, tl.zeros((TILE,), tl.float32), mask=j < channels)
    else:
        taps += batch * kh * kw * channels * depth
        gram = _correlation(taps, i, j, offset, channels, depth, kh, kw, TILE, DEPTH, PRECISION)
        sign = (gram > 0).to(tl.int8) - (gram < 0).to(tl.int8)
        inside = (i < channels)[:, None] & (j < channels)[None, :]
        line = offsets * channels
        signs += batch * channels * line
        i_wide, j_wide = i.to(tl.int64), j.to(tl.int64)
        place = i_wide[:, None] * line + offset * channels + j[None, :]
        tl.store(signs + place, sign, mask=inside)
        off_diagonal = (offset > 0) | (column > row)
        if (offset == 0) & (column > row):
            place = j_wide[:, None] * line + i[None, :]
            tl.store(signs + place, tl.trans(sign), mask=tl.trans(inside))
        q += batch * channels
        size = tl.abs(gram)
        q_i = tl.load(q + i, mask=i < channels, other=0)
        q_j = tl.load(q + j, mask=j < channels, other=0)
        tl.store(row_sums, tl.sum(size * q_j[None, :], axis=1), mask=i < channels)
        down = tl.sum(size * q_i[:, None], axis=0)
        tl.store(column_sums, tl.where(off_diagonal, down, 0.0), mask=j < channels)


@triton.jit
def _correlation(
    taps,
    i,
    j,
    offset,
    channels,
    depth,
    kh,
    kw,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of G_delta: the sum over the taps that have a tap at distance delta, and over n."""
    dy = (offset + kw - 1) // (2 * kw - 1)
    dx = offset - dy * (2 * kw - 1)
    first = tl.maximum(-dx, 0)
    width = kw - tl.maximum(dx, -dx)
    steps = tl.cdiv(depth, DEPTH)
    k = tl.arange(0, DEPTH)
    size = tl.cast(channels, tl.int64) * depth
    left = i.to(tl.int64)[:, None] * depth + k[None, :]
    right = j.to(tl.int64)[:, None] * depth + k[None, :]
    gram = tl.zeros((TILE, TILE), tl.float32)
    for step in range((kh - dy) * width * steps):
        tap, start = step // steps, (step % steps) * DEPTH
        x = (tap // width) * kw + first + tap % width
        y = x + dy * kw + dx
        deep = (k < depth - start)[None, :]
        a = tl.load(taps + x * size + start + left, mask=(i < channels)[:, None] & deep, other=0)
        b = tl.load(taps + y * size + start + right, mask=(j < channels)[:, None] & deep, other=0)
        gram = tl.dot(a, tl.trans(b), gram, input_precision=PRECISION)
    return gram


@triton.jit
def gram_bound_backward_kernel(
    taps,
    signs,
    a,
    q,
    grad,
    channels,
    depth,
    kh,
    kw,
    batch_stride,
    row_stride,
    column_stride,
    channel_stride,
    depth_stride,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.cdiv(depth, TILE)
    row, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    x, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = row * TILE + tl.arange(0, TILE)
    n = column * TILE + tl.arange(0, TILE)
    offsets = ((2 * kh - 1) * (2 * kw - 1) + 1) // 2
    line = tl.cast(offsets * channels, tl.int64)
    size = tl.cast(channels, tl.int64) * depth
    taps += batch * kh * kw * size
    grad += batch * batch_stride + (x // kw) * row_stride + (x % kw) * column_stride
    signs += batch * channels * line
    a += batch * channels
    q += batch * channels
    a_i = tl.load(a + i, mask=i < channels, other=0)[:, None]
    q_i = tl.load(q + i, mask=i < channels, other=0)[:, None]
    j = tl.arange(0, DEPTH)
    steps = tl.cdiv(channels, DEPTH)
    right = n.to(tl.int64)[:, None] * channels + j[None, :]
    across = i.to(tl.int64)[:, None] * line + j[None, :]
    down = j.to(tl.int64)[:, None] * line + i[None, :]
    inside, deep = (i < channels)[:, None], (n < depth)[:, None]
    out = tl.zeros((TILE, TILE), tl.float32)
    for step in range(x * steps, kh * kw * steps):  # taps y >= x: offsets of the half plane
        y, start = step // steps, (step % steps) * DEPTH
        offset = (y // kw - x // kw) * (2 * kw - 1) + y % kw - x % kw
        live = (j < channels - start)[None, :]
        sign = tl.load(signs + offset * channels + start + across, mask=inside & live, other=0)
        factor = _weighted(sign, a, q, a_i, q_i, start + j, channels)
        b = tl.load(taps + y * size + start + right, mask=deep & live, other=0)
        out = tl.dot(factor, tl.trans(b), out, input_precision=PRECISION)
    for step in range(x * steps):  # y < x: the transpose of the opposite offset
        y, start = step // steps, (step % steps) * DEPTH
        offset = (x // kw - y // kw) * (2 * kw - 1) + x % kw - y % kw
        live = (j < channels - start)[None, :]
        sign = tl.load(
            signs + start * line + offset * channels + down,
            mask=tl.trans(inside) & tl.trans(live),
            other=0,
        )
        factor = _weighted(tl.trans(sign), a, q, a_i, q_i, start + j, channels)
        b = tl.load(taps + y * size + start + right, mask=deep & live, other=0)
        out = tl.dot(factor, tl.trans(b), out, input_precision=PRECISION)
    place = i.to(tl.int64)[:, None] * channel_stride + n.to(tl.int64)[None, :] * depth_stride
    tl.store(grad + place, out, mask=inside & (n < depth)[None, :])


@triton.jit
def _weighted(sign, a, q, a_i, q_i, j, channels):
    a_j = tl.load(a + j, mask=j < channels, other=0)[None, :]
    q_j = tl.load(q + j, mask=j < channels, other=0)[None, :]
    weight = a_i * q_j + a_j * q_i
    return tl.where(sign > 0, weight, tl.where(sign < 0, -weight, 0.0))
