"""aol_rescale in Triton: scaling, cast and layout in one pass, and so the derivative."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import on_its_gpu

_ROWS = 8  # of the backward kernel's programs: as many numbers are added up one after another
_TILE = 1024  # numbers of a program at a time


@on_its_gpu
def aol_rescale_forward(weight: Tensor, r: Tensor, out: Tensor) -> None:
    """Write weight r^(-1/2) into out.

    Args:
        weight: (n, o, c, taps), contiguous, float32.
        r: (n, c), contiguous, float32.
        out: (n, o, c, taps) of any floating-point dtype and strides, written.
    """
    n, rows, channels, taps = weight.shape
    block, padded = _block(channels, taps)
    aol_rescale_forward_kernel[(triton.cdiv(channels, block) * n * rows,)](
        weight,
        r,
        out,
        rows,
        channels,
        taps,
        *out.stride(),
        BLOCK=block,
        TAPS=padded,
    )


@on_its_gpu
def aol_rescale_backward(grad: Tensor, weight: Tensor, r: Tensor, out: Tensor) -> Tensor:
    """Write dL/dweight into out, contiguous, and return the sums over it times weight, (n, c).

    dL/dr is -1 / (2 r) times these sums. Arguments as in the forward, grad of any dtype and
    strides.
    """
    n, rows, channels, taps = weight.shape
    block, padded = _block(channels, taps)
    parts = triton.cdiv(rows, _ROWS)
    # Sums over the rows of each part: added up in a fixed order.
    partial = r.new_empty(n, parts, channels)
    aol_rescale_backward_kernel[(triton.cdiv(channels, block) * n * parts,)](
        grad,
        weight,
        r,
        out,
        partial,
        rows,
        channels,
        taps,
        *grad.stride(),
        ROWS=_ROWS,
        BLOCK=block,
        TAPS=padded,
    )
    return partial.sum(dim=1)


def _block(channels: int, taps: int) -> tuple[int, int]:
    """Channels and taps of a tile, both powers of 2."""
    padded = triton.next_power_of_2(taps)
    return min(triton.next_power_of_2(channels), max(1, _TILE // padded)), padded


@triton.jit
def _factors(r, i, channels):
    value = tl.load(r + i, mask=i < channels, other=0)
    positive = value > 0
    return tl.where(positive, 1 / tl.sqrt_rn(tl.where(positive, value, 1.0)), 0.0)


@triton.jit
def aol_rescale_forward_kernel(
    weight,
    r,
    out,
    rows,
    channels,
    taps,
    n_stride,
    row_stride,
    channel_stride,
    tap_stride,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    n, row = line // rows, line % rows
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, TAPS)
    inside = (i < channels)[:, None] & (t < taps)[None, :]
    factor = _factors(r + n * channels, i, channels)
    place = i[:, None] * taps + t[None, :]
    value = tl.load(weight + line * channels * taps + place, mask=inside, other=0)
    out += n * n_stride + row * row_stride
    place = i.to(tl.int64)[:, None] * channel_stride + t.to(tl.int64)[None, :] * tap_stride
    tl.store(out + place, (value * factor[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def aol_rescale_backward_kernel(
    grad,
    weight,
    r,
    out,
    partial,
    rows,
    channels,
    taps,
    n_stride,
    row_stride,
    channel_stride,
    tap_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK)
    parts = tl.cdiv(rows, ROWS)
    task = (tl.program_id(0) // blocks).to(tl.int64)
    n, first = task // parts, task % parts * ROWS
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, TAPS)
    inside = (i < channels)[:, None] & (t < taps)[None, :]
    factor = _factors(r + n * channels, i, channels)[:, None]
    place = (n * rows + first) * channels * taps + i[:, None] * taps + t[None, :]
    grad += n * n_stride + first * row_stride
    grad_place = i.to(tl.int64)[:, None] * channel_stride + t.to(tl.int64)[None, :] * tap_stride
    sums = tl.zeros((BLOCK, TAPS), tl.float32)
    for row in range(ROWS):
        live = inside & (row < rows - first)
        value = tl.load(grad + grad_place, mask=live, other=0).to(tl.float32) * factor
        tl.store(out + place, value, mask=live)
        sums += value * tl.load(weight + place, mask=live, other=0)
        place += channels * taps
        grad_place += row_stride
    tl.store(partial + task * channels + i, tl.sum(sums, axis=1), mask=i < channels)
