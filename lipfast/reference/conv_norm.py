"""Spectral norms of convolutions: the published power iteration, and proved upper bounds."""

import math

import torch
from torch import Tensor

from .convolution import conv2d_same, conv2d_same_adjoint
from .fourier_conv import kernel_spectrum

TORUS_GRID = 64  # frequencies per axis


def power_iteration(
    kernel: Tensor, vector: Tensor, padding_mode: str, *, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """Return an estimate of the norm of a convolution and the next start vector (CPL, algorithm 1).

    The estimate never exceeds the norm and may lie far below it: it proves nothing. A start vector
    that the convolution maps to 0 is replaced by a fixed one.

    Args:
        kernel: (out, in, kh, kw), odd kh and kw.
        vector: start vector (1, in, h, w), any length; no gradient flows into it.
        padding_mode: "zeros" or "circular".
        steps: how often v <- normalised W^T W v, at least once.

    Returns:
        norm(W v), differentiable with respect to the kernel, and v.
    """
    vector = vector.detach()
    with torch.no_grad():
        other = torch.arange(vector.numel(), device=vector.device, dtype=vector.dtype).cos()
        other = (other / other.norm()).reshape(vector.shape)
        for _ in range(steps):
            image = conv2d_same(vector, kernel, None, padding_mode)
            image = conv2d_same_adjoint(image, kernel, padding_mode)
            length = image.norm()
            vector = torch.where(length > 0, image / length, other)
    return conv2d_same(vector / vector.norm(), kernel, None, padding_mode).norm(), vector


def schatten_bound(matrix: Tensor, *, squarings: int = 5) -> Tensor:
    """Return (sum_i sigma_i^p)^(1/p) >= norm_2(matrix), p = 2^(squarings + 1), by Gram iteration.

    At most rank^(1/p) above the norm (Delattre et al. 2023, theorem 1).

    Args:
        matrix: (..., m, n), real or complex.
        squarings: number of squarings of the Gram matrix, the first product counted.

    Returns:
        Real tensor (...); 0 for a zero matrix, NaN for one that is not finite.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.mH
    largest = matrix.detach().abs().amax(dim=(-2, -1))
    zero = largest == 0
    largest = torch.where(zero, 1, largest)
    power = matrix / largest[..., None, None]
    log_norm = largest.log()
    for step in range(squarings + 1):
        norm = torch.linalg.matrix_norm(power)
        safe = torch.where(zero, 1, norm)
        log_norm = log_norm + safe.log() / 2**step
        power = power / safe[..., None, None]
        if step < squarings:
            power = power @ power.mH
    return torch.where(zero, 0, log_norm.exp())


def unfolding_bound(kernel: Tensor, *, skew: bool = False, squarings: int = 5) -> Tensor:
    """Return sqrt(kh kw) min of the norms of the kernel's unfoldings >= norm of the convolution.

    The bound of Singla and Feizi (2021, theorem 1) for zero and circular padding and every map
    size, with each unfolding's norm bounded by `schatten_bound` instead of power iteration.

    Args:
        kernel: (out, in, kh, kw), or several in (batch, ...).
        skew: the convolution is skew-symmetric: the unfoldings then have equal norms in pairs and
            two suffice.
        squarings: see `schatten_bound`.

    Returns:
        Tensor without axes, or (batch,).
    """
    kh, kw = kernel.shape[-2:]
    rows_down = kernel.transpose(-3, -2)  # (out, kh, in, kw)
    unfoldings = [kernel.flatten(-3), rows_down.flatten(-4, -3).flatten(-2)]
    if not skew:
        columns_down = kernel.movedim(-1, -3)  # (out, kw, in, kh)
        unfoldings.append(kernel.movedim(-3, -1).flatten(-4, -2))
        unfoldings.append(columns_down.flatten(-4, -3).flatten(-2))
    if kh == kw == 1:
        return schatten_bound(unfoldings[0], squarings=squarings)
    norms = [schatten_bound(unfolding, squarings=squarings) for unfolding in unfoldings]
    return math.sqrt(kh * kw) * torch.stack(norms).amin(dim=0)


def torus_bound(
    kernel: Tensor, *, grid: int | tuple[int, int] = TORUS_GRID, squarings: int = 10
) -> Tensor:
    """Return a bound of the norm of a convolution for zero and circular padding and any map size.

    The largest transfer matrix on a torus of `grid`, divided by cos(pi d / n) for each axis of n
    frequencies, d = (k - 1) / 2 (Ehlich and Zeller 1964 for trigonometric polynomials of degree d).

    Args:
        kernel: (out, in, kh, kw), odd kh and kw.
        grid: frequencies per axis, one number or (rows, columns); for an axis with more
            taps than frequencies twice the taps.
        squarings: see `schatten_bound`.
    """
    kh, kw = kernel.shape[-2:]
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    rows, columns = (n if k <= n else 2 * k for n, k in ((rows, kh), (columns, kw)))
    norms = schatten_bound(kernel_spectrum(kernel, (rows, columns)), squarings=squarings)
    factor = math.cos(math.pi * (kh // 2) / rows) * math.cos(math.pi * (kw // 2) / columns)
    return norms.amax() / factor
