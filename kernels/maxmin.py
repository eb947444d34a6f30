"""maxmin in Triton: one read and one write per element, and one bit per pair."""

import triton
import triton.language as tl
from torch import Tensor

from .launch import on_its_gpu

_BLOCK = 1024  # pairs of one program; a multiple of 8, so that no mask byte has two writers
_NARROW_ELEMENTS = 2**31  # fewer than these have 32-bit offsets


@on_its_gpu
def maxmin_forward(x: Tensor, y: Tensor, mask: Tensor, *, channels_last: bool) -> None:
    """Order each pair of channels of x into y, and note the swapped pairs in mask.

    Args:
        x: (n, c, ...), floating; memory (n, c, ...), or (n, ..., c) when `channels_last`.
        y: as x, written.
        mask: uint8, one bit per pair in memory order, written.
        channels_last: which of the two layouts x and y have.
    """
    _launch(maxmin_forward_kernel, x, y, mask, channels_last)


@on_its_gpu
def maxmin_backward(grad: Tensor, out: Tensor, mask: Tensor, *, channels_last: bool) -> None:
    """Swap the pairs of grad that mask marks, into out; arguments as in `maxmin_forward`."""
    _launch(maxmin_backward_kernel, grad, out, mask, channels_last)


def _launch(kernel, x: Tensor, y: Tensor, mask: Tensor, channels_last: bool) -> None:
    channels = x.shape[1]
    positions = x.numel() // channels
    pairs = positions * (channels // 2)
    singles = positions * (channels % 2)
    grid = (triton.cdiv(pairs, _BLOCK) + triton.cdiv(singles, _BLOCK),)
    kernel[grid](
        x,
        y,
        mask,
        pairs,
        singles,
        channels,
        positions // x.shape[0],
        CHANNELS_LAST=channels_last,
        ODD=channels % 2 == 1,
        WIDE=x.numel() >= _NARROW_ELEMENTS,
        BLOCK=_BLOCK,
    )


@triton.jit
def maxmin_forward_kernel(
    x,
    y,
    mask,
    pairs,
    singles,
    channels,
    spatial,
    CHANNELS_LAST: tl.constexpr,
    ODD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = _program(WIDE)
    if WIDE:
        pairs = tl.cast(pairs, tl.int64)  # the argument may have 32 bits, twice of it may not
    pair_programs = tl.cdiv(pairs, BLOCK)
    if program < pair_programs:
        a, b = _load_pairs(x, program, pairs, channels, spatial, CHANNELS_LAST, ODD, BLOCK)
        swap = _wide(b) > _wide(a)
        larger = tl.where(b != b, b, tl.where(swap, b, a))
        smaller = tl.where(a != a, a, tl.where(swap, a, b))
        _store_pairs(
            y, larger, smaller, program, pairs, channels, spatial, CHANNELS_LAST, ODD, BLOCK
        )
        bits = tl.reshape(swap.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
        byte = program * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        tl.store(mask + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte * 8 < pairs)
    else:
        _copy_last_channel(
            x, y, program - pair_programs, singles, channels, spatial, CHANNELS_LAST, BLOCK
        )


@triton.jit
def maxmin_backward_kernel(
    x,
    y,
    mask,
    pairs,
    singles,
    channels,
    spatial,
    CHANNELS_LAST: tl.constexpr,
    ODD: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = _program(WIDE)
    if WIDE:
        pairs = tl.cast(pairs, tl.int64)  # the argument may have 32 bits, twice of it may not
    pair_programs = tl.cdiv(pairs, BLOCK)
    if program < pair_programs:
        a, b = _load_pairs(x, program, pairs, channels, spatial, CHANNELS_LAST, ODD, BLOCK)
        pair = program * BLOCK + tl.arange(0, BLOCK)
        byte = tl.load(mask + pair // 8, mask=pair < pairs, other=0).to(tl.int32)
        swap = (byte >> (pair % 8).to(tl.int32)) & 1 != 0
        first = tl.where(swap, b, a)
        second = tl.where(swap, a, b)
        _store_pairs(y, first, second, program, pairs, channels, spatial, CHANNELS_LAST, ODD, BLOCK)
    else:
        _copy_last_channel(
            x, y, program - pair_programs, singles, channels, spatial, CHANNELS_LAST, BLOCK
        )


@triton.jit
def _program(WIDE: tl.constexpr):
    program = tl.program_id(0)
    # 32-bit divisions are several times faster; they hold while offsets do.
    return program.to(tl.int64) if WIDE else program


@triton.jit
def _wide(a):
    return a.to(tl.float32) if a.dtype.primitive_bitwidth < 32 else a


@triton.jit
def _pair_offset(pair, channels, spatial, CHANNELS_LAST: tl.constexpr):
    half = channels // 2
    if CHANNELS_LAST:
        return (pair // half) * channels + 2 * (pair % half)
    row = pair // spatial
    return ((row // half) * channels + 2 * (row % half)) * spatial + pair % spatial


@triton.jit
def _load_pairs(
    x,
    program,
    pairs,
    channels,
    spatial,
    CHANNELS_LAST: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if CHANNELS_LAST and not ODD:
        # All rows are one: read the run of both elements, then part them.
        element = 2 * program * BLOCK + tl.arange(0, 2 * BLOCK)
        both = tl.load(x + element, mask=element < 2 * pairs, other=0)
        a, b = tl.split(tl.reshape(both, (BLOCK, 2)))
    else:
        pair = program * BLOCK + tl.arange(0, BLOCK)
        offset = _pair_offset(pair, channels, spatial, CHANNELS_LAST)
        partner = 1 if CHANNELS_LAST else spatial
        a = tl.load(x + offset, mask=pair < pairs, other=0)
        b = tl.load(x + offset + partner, mask=pair < pairs, other=0)
    return a, b


@triton.jit
def _store_pairs(
    y,
    first,
    second,
    program,
    pairs,
    channels,
    spatial,
    CHANNELS_LAST: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if CHANNELS_LAST and not ODD:
        element = 2 * program * BLOCK + tl.arange(0, 2 * BLOCK)
        both = tl.reshape(tl.join(first, second), (2 * BLOCK,))
        tl.store(y + element, both, mask=element < 2 * pairs)
    else:
        pair = program * BLOCK + tl.arange(0, BLOCK)
        offset = _pair_offset(pair, channels, spatial, CHANNELS_LAST)
        partner = 1 if CHANNELS_LAST else spatial
        tl.store(y + offset, first, mask=pair < pairs)
        tl.store(y + offset + partner, second, mask=pair < pairs)


@triton.jit
def _copy_last_channel(
    x, y, program, singles, channels, spatial, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    single = program * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        offset = single * channels + channels - 1
    else:
        offset = ((single // spatial) * channels + channels - 1) * spatial + single % spatial
    tl.store(y + offset, tl.load(x + offset, mask=single < singles), mask=single < singles)
