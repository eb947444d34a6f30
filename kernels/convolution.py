"""Same-size convolution in Triton: an implicit matrix product over channels-last maps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_NARROW_POSITIONS = 2**31 - 256  # fewer positions than these are numbered in 32 bits
_PROGRAMS = 128  # smaller tiles where larger ones would leave multiprocessors idle
_BLOCK = 1024  # bits that one program packs; a multiple of 8, so that no byte has two writers


def pack_taps(kernel: Tensor) -> Tensor:
    """Return the taps (kh, kw, out, in), contiguous, of a kernel (out, in, kh, kw).

    Tensor cores read TF32 operands along the dimension that is summed over: here the last one.
    """
    return kernel.permute(2, 3, 0, 1).contiguous()


def pack_adjoint_taps(kernel: Tensor) -> Tensor:
    """Return the taps (kh, kw, in, out) of the adjoint of the convolution with `kernel`."""
    return kernel.flip(2, 3).permute(2, 3, 1, 0).contiguous()


def convolution_sum(
    x: Tensor,  # (n, in, h, w)
    taps: Tensor,  # (kh, kw, out, in)
    padding_mode: str,
    out: Tensor,  # (n, out, h, w)
    *,
    beta: float,
    alpha: float,
    addend: Tensor,  # (n, out, h, w)
    gamma: float = 0.0,
    second: Tensor | None = None,  # (n, out, h, w)
) -> None:
    """Write alpha addend + beta conv(x) into out, and gamma conv(x) into second if it is given.

    Sums are taken in float32; float32 operands are rounded to TF32 where torch lets convolutions
    do so (`torch.backends.cudnn.allow_tf32`). Mathematics and tiles: docs/math/convolution.md.

    Args:
        x: float32, bfloat16 or float16; all maps lie in memory as (n, h, w, channels), dense.
        taps: from `pack_taps` or `pack_adjoint_taps`, odd kh and kw, dtype of x.
        padding_mode: "zeros" or "circular".
        out: written; may be `addend`, but not x.
        addend, second: any of the dtypes of x.
    """
    _launch(x, taps, padding_mode, out, "sum", addend, second, alpha, beta, gamma)


def convolution_relu(
    x: Tensor, taps: Tensor, bias: Tensor | None, padding_mode: str, out: Tensor, mask: Tensor
) -> None:
    """Write relu(conv(x) + bias) into out, and into mask where it is positive.

    Args:
        x, taps, padding_mode: as in `convolution_sum`.
        bias: (out,), contiguous, floating, or None.
        out: (n, out, h, w), written.
        mask: uint8, ceil(out.numel() / 8), written: bit j % 8 of byte j // 8 belongs to value j of
            out in memory order.
    """
    _launch(x, taps, padding_mode, out, "relu", bias, mask)
    if out.numel() and out.shape[1] % 8:  # a byte may hold bits of two tiles
        grid = (triton.cdiv(out.numel(), _BLOCK),)
        pack_signs_kernel[grid](out, mask, out.numel(), BLOCK=_BLOCK)


def convolution_masked(
    x: Tensor, taps: Tensor, bias: Tensor | None, padding_mode: str, mask: Tensor, out: Tensor
) -> None:
    """Write conv(x) + bias into out where mask has a bit, and 0 elsewhere.

    Args: as in `convolution_relu`; mask is read.
    """
    _launch(x, taps, padding_mode, out, "masked", bias, mask)


def _launch(
    x: Tensor,
    taps: Tensor,
    padding_mode: str,
    out: Tensor,
    epilogue: str,
    operand: Tensor | None,
    other: Tensor | None,
    alpha: float = 0.0,
    beta: float = 0.0,
    gamma: float = 0.0,
) -> None:
    n, depth, height, width = x.shape
    kh, kw, channels, _ = taps.shape
    positions = n * height * width
    if positions * channels == 0:
        return
    precision = _precision(x.dtype)
    tile, columns, slice_, warps = _shape_class(positions, channels, depth, x.dtype, precision)
    convolution_kernel[(triton.cdiv(positions, tile) * triton.cdiv(channels, columns),)](
        x,
        taps,
        out,
        out if operand is None else operand,
        out if other is None else other,
        positions,
        height,
        width,
        depth,
        channels,
        alpha,
        beta,
        gamma,
        KH=kh,
        KW=kw,
        CIRCULAR=padding_mode == "circular",
        EPILOGUE=epilogue,
        OPERAND=operand is not None,
        OTHER=other is not None,
        WHOLE_BYTES=channels % 8 == 0,
        WIDE=positions >= _NARROW_POSITIONS,
        TILE=tile,
        COLUMNS=columns,
        DEPTH=slice_,
        PRECISION=precision,
        num_warps=warps,
        num_stages=3,
    )


def _shape_class(
    positions: int, channels: int, depth: int, dtype: torch.dtype, precision: str
) -> tuple[int, int, int, int]:
    """Positions and channels of a tile, input channels of a step, warps."""
    columns = min(128, max(16, triton.next_power_of_2(channels)))
    if depth % 16 or channels % 16:  # Triton then loads single elements: more would spill
        return 64, min(columns, 32), 16, 4
    if dtype == torch.float32 and precision == "ieee":
        return 64, min(columns, 64), 32, 4
    # 128 bytes of every position in a step
    slice_ = min(128 // dtype.itemsize, max(16, triton.next_power_of_2(depth)))
    if triton.cdiv(positions, 128) * triton.cdiv(channels, columns) < _PROGRAMS:
        return 64, min(columns, 64), min(slice_, 32), 4
    return 128, columns, slice_, 8 if columns >= 64 else 4


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "ieee"
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee"
    return "tf32" if cudnn.allow_tf32 else "ieee"


@triton.jit
def convolution_kernel(
    x,
    taps,
    out,
    operand,
    other,
    positions,
    height,
    width,
    depth,
    channels,
    alpha,
    beta,
    gamma,
    KH: tl.constexpr,
    KW: tl.constexpr,
    CIRCULAR: tl.constexpr,
    EPILOGUE: tl.constexpr,
    OPERAND: tl.constexpr,
    OTHER: tl.constexpr,
    WHOLE_BYTES: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles of the same positions run side by side: they read the same part of x.
    tiles = tl.cdiv(channels, COLUMNS)
    program = tl.program_id(0)
    first = (program // tiles).to(tl.int64) * TILE
    inner = tl.arange(0, TILE)
    position = (first if WIDE else first.to(tl.int32)) + inner
    channel = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    total = _products(
        x, taps, position, channel, positions, height, width, depth, channels,
        KH, KW, CIRCULAR, TILE, COLUMNS, DEPTH, PRECISION,
    )  # fmt: skip
    inside = (position < positions)[:, None] & (channel < channels)[None, :]
    start = first * channels  # 64 bits once, 32 within the tile: wider ones would spill
    place = inner[:, None] * channels + channel[None, :]
    out += start
    # the tile's part of a mask whose bytes do not cross positions
    group = (program % tiles) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    whole = inner[:, None] * (channels // 8) + group[None, :]
    whole_inside = (position < positions)[:, None] & (group < channels // 8)[None, :]
    if EPILOGUE == "sum":
        addend = tl.load(operand + start + place, mask=inside, other=0).to(tl.float32)
        value = alpha * addend + beta * total
        if OTHER:
            tl.store(other + start + place, (gamma * total).to(other.dtype.element_ty), mask=inside)
    else:
        value = total
        if OPERAND:
            bias = tl.load(operand + channel, mask=channel < channels, other=0)
            value += bias.to(tl.float32)[None, :]
        if EPILOGUE == "relu":
            value = tl.where(value < 0, 0.0, value)  # keeps NaN, as relu does
        elif WHOLE_BYTES:
            byte = tl.load(other + start // 8 + whole, mask=whole_inside, other=0).to(tl.int32)
            bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
            value = tl.where(tl.reshape(bits, (TILE, COLUMNS)) != 0, value, 0.0)
        else:
            bit = place + (start & 7).to(tl.int32)
            byte = tl.load(other + (start >> 3) + (bit >> 3), mask=inside, other=0).to(tl.int32)
            value = tl.where((byte >> (bit & 7)) & 1 != 0, value, 0.0)
    value = value.to(out.dtype.element_ty)
    tl.store(out + place, value, mask=inside)
    if EPILOGUE == "relu" and WHOLE_BYTES:
        bits = tl.reshape((value > 0).to(tl.int32), (TILE, COLUMNS // 8, 8))
        bytes_ = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
        tl.store(other + start // 8 + whole, bytes_.to(tl.uint8), mask=whole_inside)


@triton.jit
def _products(
    x,
    taps,
    position,
    channel,
    positions,
    height,
    width,
    depth,
    channels,
    KH: tl.constexpr,
    KW: tl.constexpr,
    CIRCULAR: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the convolution: the sum over taps and input channels."""
    column = (position % width).to(tl.int32)
    row = (position // width % height).to(tl.int32)
    exists = position < positions
    k = tl.arange(0, DEPTH)
    left = position.to(tl.int64) * depth
    right = channel.to(tl.int64)[:, None] * depth + k[None, :]
    size = tl.cast(channels, tl.int64) * depth
    steps = tl.cdiv(depth, DEPTH)
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    for step in range(KH * KW * steps):
        tap, start = step // steps, (step % steps) * DEPTH
        y, z = row + tap // KW - KH // 2, column + tap % KW - KW // 2
        if CIRCULAR:  # a map smaller than the kernel is passed several times
            live = exists
            y = (y % height + height) % height
            z = (z % width + width) % width
        else:
            live = exists & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        neighbour = left + ((y - row) * width + z - column).to(tl.int64) * depth
        deep = (k < depth - start)[None, :]
        a = tl.load(x + start + neighbour[:, None] + k[None, :], mask=live[:, None] & deep, other=0)
        b = tl.load(
            taps + tap * size + start + right, mask=(channel < channels)[:, None] & deep, other=0
        )
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def pack_signs_kernel(values, mask, size, BLOCK: tl.constexpr):
    """Eight values > 0 to a byte, the first in its lowest bit."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    bits = (tl.load(values + index, mask=index < size, other=0) > 0).to(tl.int32)
    bytes_ = tl.sum(tl.reshape(bits, (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :], axis=1)
    place = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(mask + place, bytes_.to(tl.uint8), mask=place * 8 < size)
