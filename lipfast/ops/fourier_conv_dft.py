"""Planar, frequency-major Fourier transforms of maps, by products with tables where that is faster.

`transform` is U x and `inverse` is U^T, for the real orthonormal rows

    U = sqrt(m_f / (h w)) [cos(2 pi f . p / (h, w)); -sin(2 pi f . p / (h, w))],

with f in the half plane of the real transform, m_f = 1 for the columns f_x = 0 and w / 2 and 2 for
the others: U^T U = I, so that one table serves both ways and their derivatives.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Measured with one thread of a CPU by bench/bench_fourier_conv.py: one product with the whole table
# up to this many positions of the map, one product for each axis up to this side, then the FFT.
_DIRECT = 100
_SEPARABLE = 112


def transform(x: Tensor) -> Tensor:
    """Return U x, (2, F, n, c) for x (n, c, h, w), F in the order of `to_batch`."""
    n, c, h, w = x.shape
    frequencies = h * (w // 2 + 1)
    x = x.reshape(n * c, h * w)
    method = _method(h, w)
    if method == "direct":
        x_hat = _table(h, w, x.dtype, x.device) @ x.T
    elif method == "separable":
        x_hat = _separable(x, h, w)
    else:
        values = torch.view_as_real(torch.fft.rfft2(x.view(n * c, h, w), norm="ortho"))
        x_hat = x.new_empty(2, frequencies, n * c)
        scale = _scale(h, w, x.dtype, x.device)
        torch.mul(values.view(n * c, frequencies, 2).permute(2, 1, 0), scale, out=x_hat)
    return x_hat.view(2, frequencies, n, c)


def inverse(x_hat: Tensor, h: int, w: int) -> Tensor:
    """Return U^T x_hat, (n, c, h, w) for x_hat (2, F, n, c)."""
    _, frequencies, n, c = x_hat.shape
    method = _method(h, w)
    if method == "direct":
        table = _table(h, w, x_hat.dtype, x_hat.device)
        x = x_hat.view(2 * frequencies, n * c).T @ table
    elif method == "separable":
        x = _separable_inverse(x_hat, h, w)
    else:
        values = x_hat.new_empty(n * c, frequencies, 2)
        scale = _scale(h, w, x_hat.dtype, x_hat.device)
        torch.div(x_hat.view(2, frequencies, n * c), scale, out=values.permute(2, 1, 0))
        half_plane = torch.view_as_complex(values).view(n * c, h, w // 2 + 1)
        x = torch.fft.irfft2(half_plane, s=(h, w), norm="ortho")
    return x.view(n, c, h, w)


def to_batch(spectrum: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Return real and imaginary parts, (F, out, in), of a spectrum (h (w // 2 + 1), 2, out, in).

    In the order of its frequencies, or f_x before f_y where the axes are transformed one by one.
    """
    if _method(h, w) != "separable":
        return spectrum[:, 0], spectrum[:, 1]
    _, _, rows, columns = spectrum.shape
    grid = spectrum.reshape(h, w // 2 + 1, 2, rows, columns).permute(2, 1, 0, 3, 4)
    parts = grid.reshape(2, len(spectrum), rows, columns)
    return parts[0], parts[1]


def from_batch(parts: Tensor, h: int, w: int) -> Tensor:
    """Return the spectrum whose real and imaginary parts are parts, (2, F, out, in)."""
    _, frequencies, rows, columns = parts.shape
    if _method(h, w) != "separable":
        return parts.transpose(0, 1).contiguous()
    grid = parts.view(2, w // 2 + 1, h, rows, columns).permute(2, 1, 0, 3, 4)
    return grid.reshape(frequencies, 2, rows, columns)


def _method(h: int, w: int) -> str:
    if h * w <= _DIRECT:
        return "direct"
    return "separable" if max(h, w) <= _SEPARABLE else "fft"


def _separable(x: Tensor, h: int, w: int) -> Tensor:
    across, cosine, sine = _axis_tables(h, w, x.dtype, x.device)
    half = w // 2 + 1
    cosine, sine = cosine.expand(half, h, h), sine.expand(half, h, h)
    real, imaginary = (across @ x.view(-1, w).T).view(2, half, -1, h).mT
    x_hat = x.new_empty(2, half, h, x.shape[0])
    torch.bmm(cosine, real, out=x_hat[0]).baddbmm_(sine, imaginary)
    torch.bmm(cosine, imaginary, out=x_hat[1]).baddbmm_(sine, real, alpha=-1)
    return x_hat


def _separable_inverse(x_hat: Tensor, h: int, w: int) -> Tensor:
    across, cosine, sine = _axis_tables(h, w, x_hat.dtype, x_hat.device)
    half = w // 2 + 1
    cosine, sine = cosine.expand(half, h, h), sine.expand(half, h, h)
    real, imaginary = x_hat.view(2, half, h, -1).mT
    rows = x_hat.new_empty(2, half, real.shape[1], h)
    torch.bmm(real, cosine, out=rows[0]).baddbmm_(imaginary, sine, alpha=-1)
    torch.bmm(imaginary, cosine, out=rows[1]).baddbmm_(real, sine)
    return rows.view(2 * half, -1).T @ across


def phases(frequencies: int, n: int, positions: range, device: torch.device) -> Tensor:
    """2 pi f p / n in float64, with the turns reduced exactly before rounding."""
    f = torch.arange(frequencies, device=device)
    p = torch.arange(positions.start, positions.stop, device=device)
    return torch.outer(f, p).remainder(n).to(torch.float64) * (2 * math.pi / n)


def cached_table(build: Callable[..., Any]) -> Any:
    """Keep what `build(..., device)` returns, for training too where inference asks for it first.

    Never dropped: a CUDA graph may hold the addresses. A map of 34 x 34 needs 15 KB.
    """

    @functools.cache
    @torch.inference_mode(False)
    @torch.no_grad()
    def cached(*key: Any) -> Any:
        device = key[-1]
        if device.type != "cuda":
            return build(*key)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("fourier_conv: run a step of this map size before capturing one")
        tables = build(*key)
        torch.cuda.current_stream(device).synchronize()  # the next reader may be on another stream
        return tables

    return cached


@cached_table
def _table(h: int, w: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """U, (2 F, h w)."""
    half = w // 2 + 1
    down = phases(h, h, range(h), device)[:, None, :, None]
    angle = down + phases(half, w, range(w), device)[None, :, None, :]
    parts = torch.stack([angle.cos(), -angle.sin()]) * _column_scale(h, w, device)[:, None, None]
    return parts.view(2 * h * half, h * w).to(dtype)


@cached_table
def _axis_tables(
    h: int, w: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of U: (2 (w // 2 + 1), w) across, cosine and sine (h, h) down, symmetric."""
    across = phases(w // 2 + 1, w, range(w), device)
    parts = torch.stack([across.cos(), -across.sin()]) * _column_scale(h, w, device)[:, None]
    down = phases(h, h, range(h), device)
    return parts.view(-1, w).to(dtype), down.cos().to(dtype), down.sin().to(dtype)


@cached_table
def _scale(h: int, w: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """sqrt(m_f), (F, 1)."""
    column = _column_scale(h, w, device) * math.sqrt(h * w)
    return column.repeat(h)[:, None].to(dtype)


def _column_scale(h: int, w: int, device: torch.device) -> Tensor:
    """sqrt(m_f / (h w)) for f_x = 0, ..., w // 2, in float64."""
    multiplicity = torch.full((w // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    multiplicity[0] = 1
    if w % 2 == 0:
        multiplicity[-1] = 1
    return (multiplicity / (h * w)).sqrt()


# U and U^T for derivatives of derivatives, each the derivative of the other ----------------------


def _transform_fake(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty(2, h * (w // 2 + 1), n, c)


def _save_map_size(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.map_size = inputs[0].shape[2:]


torch.library.define("lipfast::fourier_transform", "(Tensor x) -> Tensor")
torch.library.impl("lipfast::fourier_transform", ("cpu", "cuda"), transform)
torch.library.register_fake("lipfast::fourier_transform", _transform_fake)
torch.library.register_autograd(
    "lipfast::fourier_transform",
    lambda ctx, grad: torch.ops.lipfast.fourier_inverse(grad, *ctx.map_size),
    setup_context=_save_map_size,
)

torch.library.define("lipfast::fourier_inverse", "(Tensor x_hat, SymInt h, SymInt w) -> Tensor")
torch.library.impl(
    "lipfast::fourier_inverse",
    ("cpu", "cuda"),
    lambda x_hat, h, w: inverse(x_hat.contiguous(), h, w),
)
torch.library.register_fake(
    "lipfast::fourier_inverse", lambda x_hat, h, w: x_hat.new_empty(*x_hat.shape[2:], h, w)
)
torch.library.register_autograd(
    "lipfast::fourier_inverse",
    lambda ctx, grad: (torch.ops.lipfast.fourier_transform(grad), None, None),
)
