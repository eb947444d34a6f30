"""Polynomials of a skew-symmetric convolution (SOC: Singla and Feizi 2021)."""

import math

import torch
from torch import Tensor

from .convolution import conv2d_same, transpose_kernel
from .fourier_conv import frequency_table
from .series import taylor_coefficients

_SPECTRUM_ENTRIES = 1 << 24  # of the transfer matrices held at once


def skew_kernel(weight: Tensor) -> Tensor:
    """Return the kernel of (M - M^T) / 2, M the convolution with `weight` (..., c, c, kh, kw)."""
    return 0.5 * (weight - transpose_kernel(weight))


def skew_exp(x: Tensor, kernel: Tensor, terms: int, padding_mode: str) -> Tensor:
    """Return sum_{k <= terms} L^k x / k!, L the convolution with the skew `kernel` (SOC, eq. 8).

    See `skew_polynomial` for the arguments.
    """
    return skew_polynomial(x, kernel, taylor_coefficients(terms), padding_mode)


def skew_polynomial(
    x: Tensor, kernel: Tensor, coefficients: tuple[float, ...], padding_mode: str
) -> Tensor:
    """Return sum_k a_k L^k x, L the convolution with the skew `kernel`, term by term.

    Args:
        x: (n, c, h, w).
        kernel: (c, c, kh, kw) with L^T = -L, odd kh and kw.
        coefficients: a_0, ..., a_n, none of them 0.
        padding_mode: "zeros" or "circular".
    """
    first, *rest = coefficients
    term = x if first == 1 else first * x
    total = term
    for a, following in zip(coefficients, rest, strict=False):
        term = conv2d_same(term, kernel, None, padding_mode) / (a / following)
        total = total + term
    return total


def matrix_polynomial(matrix: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return sum_k a_k M^k of square matrices (..., c, c), by n - 1 products."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    total = coefficients[-2] * identity + coefficients[-1] * matrix
    for a in reversed(coefficients[:-2]):
        total = a * identity + total @ matrix
    return total


def skew_power_iteration(kernel: Tensor, vectors: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return an estimate of the norm of a skew convolution and the next start vectors.

    One power iteration v <- L v for every frequency of a torus of `side` pixels: frequencies never
    mix, so that one vector for all of them would lose sight of those that grow later. One
    application of L serves both, since L is normal. The estimate, the largest norm(L v), never
    exceeds the norm of L on that torus; it may lie far below it and proves nothing. The square mean
    of all singular values there, a lower bound too, takes its place where it is larger: that
    happens only far from convergence.

    Args:
        kernel: (c, c, k, k) with L^T = -L, or several in (batch, ...).
        vectors: (2, side * (side // 2 + 1), c), real and imaginary parts, of any length, or
            (batch, ...); where they are 0 or not finite a fixed one takes their place. No gradient
            flows into them.
        side: pixels per axis, k < side, or 1 for a 1x1 kernel.

    Returns:
        The estimate, without axes or (batch,), differentiable with respect to the kernel, and
        vectors of length 1.
    """
    vectors = vectors.detach()
    waves = frequency_table(kernel, (side, side))
    with torch.no_grad():
        vectors = _unit_vectors(vectors)
        images = _transform(kernel, vectors, waves)
        norms = images.norm(dim=(-3, -1))[..., None, :, None]
        following = torch.where(norms > 0, images / norms, vectors)
        largest = norms.argmax(dim=-2, keepdim=True)
        vector = torch.take_along_dim(vectors, largest, dim=-2)
        wave = waves.index_select(0, largest.flatten()).view(*largest.shape[:-3], 1, -1)
    estimate = torch.linalg.vector_norm(_transform(kernel, vector, wave), dim=(-3, -2, -1))
    length = torch.linalg.vector_norm(kernel, dim=(-4, -3, -2, -1))
    return torch.maximum(estimate, length / math.sqrt(kernel.shape[-3])), following


def _unit_vectors(vectors: Tensor) -> Tensor:
    lengths = vectors.norm(dim=(-3, -1))[..., None, :, None]
    fixed = torch.arange(vectors.shape[-1], device=vectors.device).to(vectors.dtype).cos()
    fixed = fixed / (fixed.norm() * math.sqrt(2))
    return torch.where((lengths > 0) & lengths.isfinite(), vectors / lengths, fixed)


def _transform(kernel: Tensor, vectors: Tensor, waves: Tensor) -> Tensor:
    """Multiply a vector (..., 2, F, c) per frequency by the transfer matrix, tap by tap."""
    c = kernel.shape[-3]
    taps = kernel.movedim((-2, -1), (-4, -3)).flatten(-4, -2)
    products = taps @ vectors.flatten(-3, -2).mT  # (..., k k c, 2 F)
    products = products.unflatten(-2, (-1, c)).unflatten(-1, (2, -1))
    cos, sin = (part.mT[..., None, :] for part in (waves.real, waves.imag))  # (..., k k, 1, F)
    real, imaginary = products[..., 0, :], products[..., 1, :]
    parts = (cos * real - sin * imaginary, cos * imaginary + sin * real)
    return torch.stack([part.sum(dim=-3).mT for part in parts], dim=-3)


def skew_norm_bound(kernel: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return the norm of a skew convolution on a torus of `side` pixels, and a bound for every map.

    Both from the eigenvalues of the Hermitian transfer matrices i K(f) on a torus of twice that
    side: the first from every second frequency per axis, what `skew_power_iteration` converges to,
    the second for zero and circular padding, see `torus_bound`.

    Args:
        kernel: (c, c, k, k), L^T = -L, odd k, k < side, or side 1 for a 1x1 kernel; float64 for a
            proof.
        side: pixels per axis.
    """
    c, _, kh, kw = kernel.shape
    waves = frequency_table(kernel, (2 * side, 2 * side))
    taps = kernel.reshape(c * c, kh * kw).T
    norms = []
    for part in waves.split(max(1, _SPECTRUM_ENTRIES // c**2)):
        hermitian = torch.complex(-(part.imag @ taps), part.real @ taps).reshape(-1, c, c)
        norms.append(torch.linalg.eigvalsh(hermitian).abs().amax(dim=-1))
    norm = torch.cat(norms).reshape(2 * side, side + 1)
    rounding = 1 + 8 * c * torch.finfo(kernel.dtype).eps
    factor = math.cos(math.pi * (kh // 2) / (2 * side)) * math.cos(math.pi * (kw // 2) / (2 * side))
    return norm[::2, ::2].amax(), norm.amax() * (rounding / factor)
