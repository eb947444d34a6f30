"""The norm of a convolution on one map, within about 1e-4 above, with a proof by Cholesky."""

import math

import torch
from torch import Tensor

from lipfast.ops.context import one_by_one
from lipfast.ops.conv_norm import _convolve, _convolve_adjoint, _unit
from lipfast.reference import kernel_spectrum, torus_bound, transpose_kernel

_MARGINS = (1e-4, 1e-3, 1e-2)  # of the bound over the estimate, tried in turn
_WORK_LIMIT = 4e11  # multiply-adds of the banded factorisation: about 10 s on one core
_TORUS_GRID = 64  # frequencies per axis beyond which a coarser grid and a factor take over
_CHUNK = 1 << 23  # numbers in the matrices that are factorised together
_ITERATIONS = 400
_EPS = torch.finfo(torch.float64).eps  # twice the unit roundoff


def conv_norm_map_bound(
    kernel: Tensor,  # (out, in, kh, kw)
    map_size: tuple[int, int],
    padding_mode: str,
) -> Tensor:
    """Return a proved upper bound of the norm of a same-size convolution on maps of `map_size`.

    A Lanczos iteration estimates the norm; that b, 1e-4 above the estimate, is a bound is then
    proved in float64 by the factorisation of b^2 I - W^T W: over the rows of the map for zero
    padding, frequency by frequency for circular padding. All rounding is inside the result.
    Zero-padded maps too large for that get the bound of the torus (h + kh - 1, w + kw - 1) that
    contains them, at most 2 % above the norm from 16 x 16 on for 3x3 kernels, and maps with more
    than 64 x 64 frequencies `lipfast.reference.torus_bound`'s grid. For evaluation: no derivative,
    reads values on the host, seconds for wide layers. Proof: docs/math/conv_norm.md.

    Args:
        kernel: (out, in, kh, kw), odd kh and kw; any floating-point dtype, computed in float64.
        map_size: (h, w).
        padding_mode: "zeros" or "circular".

    Returns:
        Float64 tensor without axes, on the device of kernel; NaN for a kernel that is not finite.

    Raises:
        TypeError: kernel is no floating-point tensor.
        ValueError: a shape, size or padding mode is wrong.

    Source: Rump, "Verification of positive definiteness", BIT 46 (2006); Higham, "Accuracy and
    Stability of Numerical Algorithms", 2002, section 3.1; Ehlich and Zeller, 1964.
    """
    if not isinstance(kernel, Tensor) or not kernel.is_floating_point():
        got = kernel.dtype if isinstance(kernel, Tensor) else type(kernel).__name__
        raise TypeError(f"conv_norm_map_bound: kernel must be a floating-point tensor, got {got}")
    if kernel.dim() != 4 or not all(k % 2 for k in kernel.shape[2:]):
        raise ValueError(
            "conv_norm_map_bound: kernel must have the shape (out, in, kh, kw) with odd kh and kw, "
            f"got {tuple(kernel.shape)}"
        )
    if len(map_size) != 2 or min(map_size) < 1:
        raise ValueError(f"conv_norm_map_bound: map_size must be (h, w) >= 1, got {map_size!r}")
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"conv_norm_map_bound: padding_mode must be 'zeros' or 'circular', got {padding_mode!r}"
        )
    return torch.ops.lipfast.conv_norm_map_bound(kernel.detach(), *map_size, padding_mode)


def _bound(kernel: Tensor, h: int, w: int, padding_mode: str) -> Tensor:
    kernel = kernel.double()
    if padding_mode == "zeros":
        kernel = _taps_on_the_map(kernel, h, w)
    if kernel.shape[0] < kernel.shape[1]:  # the smaller Gram operator
        kernel = transpose_kernel(kernel)
    largest = float(kernel.abs().amax()) if kernel.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return kernel.new_tensor(largest * 0.0)
    # Powers of two: exact but for numbers 1e-290 times the largest
    exponent = min(max(math.frexp(largest)[1], -1000), 1000)
    return _scaled_bound(kernel * 2.0**-exponent, h, w, padding_mode) * 2.0**exponent


def _taps_on_the_map(kernel: Tensor, h: int, w: int) -> Tensor:
    """Without the taps that only ever meet the padding."""
    dy, dx = (max(0, k // 2 - (n - 1)) for k, n in zip(kernel.shape[2:], (h, w), strict=True))
    return kernel[:, :, dy : kernel.shape[2] - dy, dx : kernel.shape[3] - dx]


def _scaled_bound(kernel: Tensor, h: int, w: int, padding_mode: str) -> Tensor:
    """`_bound` for a kernel whose largest tap is in [0.5, 1)."""
    kh, kw = kernel.shape[2:]
    if w > h:  # blocks along the shorter side
        kernel, h, w, kh, kw = kernel.mT, w, h, kw, kh
    if padding_mode == "zeros" or kh == kw == 1:
        # without taps in one direction all rows, or columns, are alike
        rows, columns = (h if kh > 1 else 1), (w if kw > 1 else 1)
        side = kernel.shape[1] * columns
        if rows * side**3 * kh * (kh + 3) / 2 <= _WORK_LIMIT:
            bound = _proved(_row_operators(kernel, columns), rows, kernel, (rows, columns), "zeros")
            if bound is not None:
                return bound
        h, w = h + kh - 1, w + kw - 1
    if h * w > _TORUS_GRID**2:
        h, w = max(_TORUS_GRID, 2 * kh), max(_TORUS_GRID, 2 * kw)
        factor = math.cos(math.pi * (kh // 2) / h) * math.cos(math.pi * (kw // 2) / w)
    else:
        factor = 1.0
    bound = _proved(_transfer_matrices(kernel, h, w), 1, kernel, (h, w), "circular")
    if bound is None:
        return torus_bound(kernel)
    # the rounding of the transfer matrices: of their phases, and of sums of kh kw products
    rounding = (kh * kw + 16) * _EPS * kernel.abs().sum(dim=(2, 3)).norm()
    return (bound + 2 * rounding) / factor * (1 + 8 * _EPS)


def _row_operators(kernel: Tensor, w: int) -> Tensor:
    """The maps from a row of w pixels to a row, one for each row of taps, (kh, 1, w out, w in)."""
    out_channels, in_channels, kh, kw = kernel.shape
    rows = kernel.new_zeros(kh, w, out_channels, w, in_channels)
    for x in range(kw):
        taps = kernel[..., x].permute(2, 0, 1)[..., None]
        rows.diagonal(offset=x - kw // 2, dim1=1, dim2=3).copy_(taps)
    return rows.view(kh, 1, w * out_channels, w * in_channels)


def _transfer_matrices(kernel: Tensor, h: int, w: int) -> Tensor:
    """The transfer matrices as real ones of twice the side, (1, F, 2 out, 2 in)."""
    spectrum = kernel_spectrum(kernel, (h, w))
    upper = torch.cat([spectrum.real, -spectrum.imag], dim=2)
    lower = torch.cat([spectrum.imag, spectrum.real], dim=2)
    return torch.cat([upper, lower], dim=1)[None]


def _proved(
    taps: Tensor, rows: int, kernel: Tensor, map_size: tuple[int, int], padding_mode: str
) -> Tensor | None:
    """A bound a little above the estimate, or None if no factorisation succeeds."""
    estimate = _estimate(kernel, map_size, padding_mode)
    chunk = max(1, _CHUNK // (taps.shape[2] * taps.shape[3]))
    for margin in _MARGINS:
        beta = (estimate * (1 + margin)) ** 2
        parts = [_excess(part, rows, beta) for part in taps.split(chunk, dim=1)]
        excess = [part for part in parts if part is not None]
        if len(excess) == len(parts):
            return (beta + torch.cat(excess).amax()).sqrt() * (1 + 8 * _EPS)
    return None


def _estimate(kernel: Tensor, map_size: tuple[int, int], padding_mode: str) -> float:
    """The norm by Lanczos iteration: at most the norm, up to rounding, and in general close."""
    kernels = kernel[None]
    index = torch.arange(kernel.shape[1] * math.prod(map_size), device=kernel.device)
    # a chirp: no frequency is missing in it, as one would be in random signs for few numbers
    vector = (index.double() ** 2).cos().view(1, kernel.shape[1], *map_size)
    vector, _ = _unit(vector)
    before, beta = torch.zeros_like(vector), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    last = 0.0
    while True:
        image = _convolve(vector, kernels, padding_mode)
        image = _convolve_adjoint(image, kernels, padding_mode) - beta * before
        diagonal.append(float((image * vector).sum()))
        image = image - diagonal[-1] * vector
        before, (vector, length) = vector, _unit(image)
        beta = float(length)
        if len(diagonal) % 10 == 0 or beta <= 1e-12 * max(diagonal):
            matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            matrix += torch.diag(torch.tensor(beside, dtype=torch.float64), -1)
            largest = float(torch.linalg.eigvalsh(matrix)[-1])
            if largest - last <= 1e-6 * largest or beta <= 1e-12 * largest:
                break
            last = largest
        if len(diagonal) == _ITERATIONS:
            break
        beside.append(beta)
    return math.sqrt(max(largest, 0.0))


def _excess(taps: Tensor, h: int, beta: float) -> Tensor | None:
    """Return e, (F,), with norm(W)^2 <= beta + e for the zero-padded operators W, or None.

    Factorises beta I - W^T W = L L^T + R by blocks, W^T W banded over the h rows of the map, and
    bounds R by what it computes and by the rounding of that: whatever `cholesky_ex` and
    `solve_triangular` return, the result is a bound.

    Args:
        taps: (kh, F, m_out, m_in), the operators from row to row.
        h: rows of the map; all terms of W^T W that meet only rows outside are left out.
        beta: squared norm to be proved.
    """
    kh, _, outputs, m = taps.shape
    gram = {(a, e): taps[a + e].mT @ taps[a] for a in range(kh) for e in range(kh - a)}
    schur: dict[tuple[int, int], Tensor] = {}

    def block(q: int, p: int) -> Tensor:
        """Of beta I - W^T W, less what the rows before have contributed."""
        if (q, p) not in schur:
            e = q - p
            first = max(0, p + kh // 2 - (h - 1))  # the output row is p + kh // 2 - a
            last = min(kh - e - 1, p + kh // 2)
            result = taps.new_zeros(taps.shape[1], m, m)
            if e == 0:
                result.diagonal(dim1=1, dim2=2).fill_(beta)
            for a in range(first, last + 1):
                result -= gram[a, e]
            schur[q, p] = result
        return schur[q, p]

    residual = taps.new_zeros(taps.shape[1])
    factor = h * taps.square().sum(dim=(0, 2, 3))
    for p in range(h):
        below = range(p + 1, min(p + kh, h))
        corner, info = torch.linalg.cholesky_ex(block(p, p))
        if bool(info.any()):
            return None
        residual += _square(torch.baddbmm(schur.pop((p, p)), corner, corner.mT, alpha=-1))
        factor += _square(corner)
        column = {}
        for q in below:
            target = block(q, p)
            column[q] = torch.linalg.solve_triangular(corner.mT, target, upper=True, left=False)
            residual += 2 * _square(
                torch.baddbmm(schur.pop((q, p)), column[q], corner.mT, alpha=-1)
            )
            factor += _square(column[q])
        for q in below:
            for r in range(p + 1, q + 1):
                block(q, r).baddbmm_(column[q], column[r].mT, alpha=-1)
    terms = kh * (outputs + m + 1) + 8
    excess = residual.sqrt() + terms * _EPS * (beta + factor)
    return excess * (1 + 1e-6) if bool(excess.isfinite().all()) else None


def _square(blocks: Tensor) -> Tensor:
    return blocks.square().sum(dim=(1, 2))


def _fake(kernel: Tensor, h: int, w: int, padding_mode: str) -> Tensor:
    return kernel.new_empty((), dtype=torch.float64)


torch.library.define(
    "lipfast::conv_norm_map_bound",
    "(Tensor kernel, SymInt h, SymInt w, str padding_mode) -> Tensor",
)
torch.library.impl("lipfast::conv_norm_map_bound", ("cpu", "cuda"), _bound)
torch.library.register_fake("lipfast::conv_norm_map_bound", _fake)
torch.library.register_vmap(
    "lipfast::conv_norm_map_bound", one_by_one(torch.ops.lipfast.conv_norm_map_bound)
)
