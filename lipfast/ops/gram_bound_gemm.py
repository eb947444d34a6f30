"""gram_bound as matrix products in plain PyTorch, each pair of taps multiplied once."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many numbers in a kernel one product over a zero-padded kernel is faster than one for
# each row of taps; measured for 3x3 kernels, where the ways meet near c = 40 and c = 72.
_ONE_PRODUCT_FORWARD = 9 * 40**2
_ONE_PRODUCT_BACKWARD = 9 * 72**2


def gram_bound_forward(taps: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the row sums r and the signs of the correlations at the half plane of offsets.

    Args:
        taps: (batch, kh, kw, c, n), channels to correlate before those to sum over.
        q: (batch, c), or None for ones.

    Returns:
        r (batch, c), and int8 signs (batch, c, offsets, c), offsets (dy, dx) in the order of
        dy (2 kw - 1) + dx = 0, 1, ...
    """
    batch, channels, count = taps.shape[0], taps.shape[3], offsets(taps)
    small = taps[0].numel() <= _ONE_PRODUCT_FORWARD
    gram = _correlate_in_one_product(taps) if small else correlate(taps)
    signs = gram.sign().to(torch.int8).view(batch, channels, count, channels)
    gram.abs_()
    if q is None:
        down = gram[:, :, channels:].sum(dim=1)
        return gram.sum(dim=2) + down.view(batch, count - 1, channels).sum(dim=1), signs
    gram = gram.view(signs.shape)
    others = gram[:, :, 1:].sum(dim=2)
    sums = gram[:, :, 0] + others + others.mT
    return (sums @ q[..., None])[..., 0] / q, signs


def gram_bound_backward(
    taps: Tensor, signs: Tensor, a: Tensor, q: Tensor | None, grad: Tensor
) -> None:
    """Write dL/dtaps into grad, for a = dL/dr / q; shapes as in the forward."""
    weights = a[:, :, None] if q is None else a[:, :, None] * q[:, None, :]
    factors = signs * (weights + weights.mT)[:, :, None]
    if taps[0].numel() <= _ONE_PRODUCT_BACKWARD:
        grad.copy_(_expand_in_one_product(taps, factors))
    else:
        expand(taps, factors.flatten(2), grad)


def correlate(taps: Tensor) -> Tensor:
    """Return the correlations (batch, c, offsets c)."""
    batch, _, kw, channels, _ = taps.shape
    gram = taps.new_zeros(batch, channels, offsets(taps) * channels)
    for kernel, out in zip(in_rows(taps), gram, strict=True):
        _correlate(kernel, channels, kw, out)
    return gram


def expand(taps: Tensor, factors: Tensor, grad: Tensor) -> None:
    """Write dL/dtaps into grad, for factors (batch, c, offsets c)."""
    _, kh, kw, channels, depth = taps.shape
    for kernel, factor, out in zip(in_rows(taps), factors, grad, strict=True):
        expanded = _expand(kernel, channels, kw, factor)
        out.copy_(expanded.view(depth, kh, kw, channels).permute(1, 2, 3, 0))


def in_rows(taps: Tensor) -> Tensor:
    """Return (batch, n, taps c), the layout that weights in their usual memory soonest turn to."""
    return taps.permute(0, 4, 1, 2, 3).contiguous().flatten(2)


def offsets(taps: Tensor) -> int:
    """Return the number of offsets in the half plane."""
    kh, kw = taps.shape[1:3]
    return ((2 * kh - 1) * (2 * kw - 1) + 1) // 2


def _runs(taps: int, kw: int) -> list[tuple[int, int, int, int]]:
    """(x, first, end, offset): tap x meets taps first to end - 1 of one row at offset, + 1, ..."""
    runs = []
    for x in range(taps):
        for row in range(x // kw, taps // kw):
            first = max(x, row * kw)
            offset = (row - x // kw) * (2 * kw - 1) + first % kw - x % kw
            runs.append((x, first, (row + 1) * kw, offset))
    return runs


def _correlate(kernel: Tensor, c: int, kw: int, gram: Tensor) -> None:
    """Add all correlations of one kernel (n, taps c) to gram (c, offsets c)."""
    for x, first, end, offset in _runs(kernel.shape[1] // c, kw):
        block = gram[:, offset * c : (offset + end - first) * c]
        block.addmm_(kernel[:, x * c : (x + 1) * c].T, kernel[:, first * c : end * c])


def _expand(kernel: Tensor, c: int, kw: int, factor: Tensor) -> Tensor:
    """The gradient of one kernel (n, taps c), with factor (c, offsets c)."""
    grad = torch.zeros_like(kernel)
    for x, first, end, offset in _runs(kernel.shape[1] // c, kw):
        block = factor[:, offset * c : (offset + end - first) * c]
        at_x = slice(x * c, (x + 1) * c)
        grad[:, at_x].addmm_(kernel[:, first * c : end * c], block.T)
        if first == x:  # offset 0 is symmetric and complete
            first, block = first + 1, block[:, c:]
        if first < end:
            grad[:, first * c : end * c].addmm_(kernel[:, at_x], block)
    return grad


def _correlate_in_one_product(taps: Tensor) -> Tensor:
    batch, kh, kw, channels, depth = taps.shape
    # In a row of kw taps and kw - 1 zeros, every offset of the half plane is one distance >= 0.
    row, tap = (2 * kw - 1) * channels * depth, channels * depth
    padded = F.pad(taps, (0, 0, 0, 0, 0, kw - 1, 0, kh - 1)).contiguous()
    shifted = padded.as_strided(
        (batch, offsets(taps), channels, kh, kw, depth),
        ((2 * kh - 1) * row, tap, depth, row, tap, 1),
    ).reshape(batch, offsets(taps) * channels, kh * kw * depth)
    return taps.permute(0, 3, 1, 2, 4).reshape(batch, channels, -1) @ shifted.mT


def _expand_in_one_product(taps: Tensor, factors: Tensor) -> Tensor:
    batch, kh, kw, channels, _ = taps.shape
    # factors (i, d, j) at all offsets, those of the other half plane first: [j, -d, i] = [i, d, j].
    plane = torch.cat([factors.transpose(1, 3)[:, :, 1:].flip(2), factors], dim=2)
    line = plane.shape[2] * channels
    row = (2 * kw - 1) * channels
    # Tap y against tap x, x from last to first: both advance the offset.
    matrix = plane.as_strided(
        (batch, kh, kw, channels, kh, kw, channels),
        (channels * line, row, channels, line, row, channels, 1),
    ).reshape(batch, kh * kw * channels, -1)
    return (matrix @ taps.flatten(1, 3)).view_as(taps).flip((1, 2))
