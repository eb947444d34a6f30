"""Circular convolution in the Fourier domain (Trockman and Kolter 2021; Xu et al. 2022)."""

import math

import torch
from torch import Tensor


def kernel_spectrum(kernel: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Return the transfer matrices of a convolution with `kernel` on maps of `map_size`.

    V(f) = sum_x kernel[:, :, x] exp(2 pi i f . (x - (k - 1) // 2) / n) at the frequencies of the
    real Fourier transform. The taps wrap around where the kernel is larger than the map.

    Args:
        kernel: (out, in, kh, kw), real.
        map_size: (h, w).

    Returns:
        Complex tensor (h * (w // 2 + 1), out, in).
    """
    out_channels, in_channels, kh, kw = kernel.shape
    table = frequency_table(kernel, map_size)
    taps = kernel.reshape(out_channels * in_channels, kh * kw).T
    spectrum = torch.complex(table.real @ taps, table.imag @ taps)
    return spectrum.reshape(-1, out_channels, in_channels)


def frequency_table(kernel: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Return the factors (h * (w // 2 + 1), kh * kw) of the taps in `kernel_spectrum`, complex."""
    h, w = map_size
    kh, kw = kernel.shape[-2:]
    rows = _phases(h, h, kh, kernel)
    columns = _phases(w // 2 + 1, w, kw, kernel)
    return (rows[:, None, :, None] * columns[None, :, None, :]).reshape(-1, kh * kw)


def fourier_conv(x: Tensor, spectrum: Tensor) -> Tensor:
    """Return irfft2(spectrum(f) rfft2(x)(f)), a circular convolution of every channel pair.

    Args:
        x: (n, in, h, w), real.
        spectrum: (h * (w // 2 + 1), out, in), complex.

    Returns:
        (n, out, h, w), real.
    """
    n, in_channels, h, w = x.shape
    if n == 0:  # torch has no Fourier transform of nothing; the graph is kept
        return (spectrum.real.sum() * x.sum()) * x.new_zeros(0, spectrum.shape[1], h, w)
    x_hat = torch.fft.rfft2(x).permute(2, 3, 1, 0).reshape(h * (w // 2 + 1), in_channels, n)
    y_hat = (spectrum @ x_hat).reshape(h, w // 2 + 1, -1, n).permute(3, 2, 0, 1)
    return torch.fft.irfft2(y_hat, s=(h, w))


def _phases(frequencies: int, n: int, taps: int, like: Tensor) -> Tensor:
    """exp(2 pi i f (x - (taps - 1) // 2) / n), with the angle reduced exactly before rounding."""
    f = torch.arange(frequencies, device=like.device)
    x = torch.arange(taps, device=like.device) - (taps - 1) // 2
    turns = torch.outer(f, x).remainder(n)
    angle = turns.to(torch.float64) * (2 * math.pi / n)
    complex_dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angle), angle).to(complex_dtype)
