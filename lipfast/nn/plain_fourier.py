"""Circular convolutions by transfer matrices in plain torch and real arithmetic (LOT, Cayley).

With C, S the cosine and sine of 2 pi f . p / (h, w), a map's transform at f has the parts C x and
-S x. A product of complex matrices and vectors, (A + iB)(r + is), takes three real ones, A r, B s
and (A + B)(r + s) (Gauss); sums before and after them are folded into the tables of the transform
and of its inverse, as are the zero padding and the crop. Derivation: docs/math/fourier_conv.md.
"""

import torch
from torch import Tensor, fx, nn

from lipfast.ops.fourier_conv_dft import phases

from .kernel import assert_map_size

_DENSE = 2  # a product of the one dense matrix costs this much less than one of the others


def plain_fourier(
    spectrum: Tensor,
    bias: Tensor | None,
    map_size: tuple[int, int],
    padding: tuple[int, int],
) -> nn.Module:
    """Return the plain module of y = crop(irfft2(spectrum(f) rfft2(pad(x))(f))) + bias.

    A dense matrix on the flattened map where that has the fewest products (tiny maps), transforms
    by one table or by one for each axis elsewhere.

    Args:
        spectrum: (H (W // 2 + 1), 2, out, in), H = h + 2 ph, W = w + 2 pw.
        bias: (out,) or None.
        map_size: (h, w).
        padding: (ph, pw), zeros on each side.

    Shapes:
        (n, in, h, w) or (in, h, w) to the same with out.
    """
    _, _, out_channels, in_channels = spectrum.shape
    h, w = map_size
    grid = (h + 2 * padding[0], w + 2 * padding[1])
    kept = len(_kept(grid))
    both = in_channels + out_channels
    direct = kept * h * w
    half = grid[1] // 2 + 1
    separable = 2 * half * h * (w + 3 * grid[0])
    products = in_channels * out_channels
    fourier = kept * products + both * min(direct, separable)
    if (h * w) ** 2 * products <= _DENSE * fourier:
        return fx.symbolic_trace(_Dense(spectrum, bias, map_size, padding))
    kind = _Direct if direct <= separable else _Separable
    return fx.symbolic_trace(kind(spectrum, bias, map_size, padding))


class _Fourier(nn.Module):
    bias: Tensor | None
    matrices: Tensor

    def __init__(
        self,
        spectrum: Tensor,
        bias: Tensor | None,
        map_size: tuple[int, int],
        padding: tuple[int, int],
    ) -> None:
        super().__init__()
        self.map_size, self.dtype = map_size, spectrum.dtype
        self.grid = (map_size[0] + 2 * padding[0], map_size[1] + 2 * padding[1])
        self.rows, self.columns = (
            range(p, p + size) for p, size in zip(padding, map_size, strict=True)
        )
        self.out_channels, self.in_channels = spectrum.shape[2:]
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._make_tables(spectrum.double())

    def _keep(self, **tables: Tensor) -> None:
        for name, table in tables.items():
            self.register_buffer(name, table.to(self.dtype).contiguous())

    def _make_tables(self, spectrum: Tensor) -> None:
        raise NotImplementedError

    def _apply_tables(self, x: Tensor) -> Tensor:
        """(h, w, n in) to (h, w, n out) flattened in any way."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        assert_map_size(x, self.map_size)
        first = x.movedim((-2, -1, -3), (0, 1, -1))  # (h, w, n, in), or without n
        y = self._apply_tables(first.flatten(2).to(self.dtype))
        y = self._biased(y.reshape(-1, self.out_channels).to(x.dtype))
        y = y.unflatten(0, first.select(-1, 0).shape)
        return y.movedim((0, 1, -1), (-2, -1, -3)).contiguous()

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


class _Direct(_Fourier):
    """One table of the independent frequencies; three matrices for each, one where it is real."""

    table: Tensor
    table_out: Tensor

    def _make_tables(self, spectrum: Tensor) -> None:
        h, w = self.grid
        kept = torch.tensor(_kept(self.grid), device=spectrum.device)
        kind, frequency = kept.unbind(1)
        down = phases(h, h, self.rows, spectrum.device)[:, None, :, None]
        across = phases(w // 2 + 1, w, self.columns, spectrum.device)[None, :, None, :]
        angle = (down + across).flatten(2).flatten(0, 1)[frequency]
        cos, sin = angle.cos(), angle.sin()
        into = torch.stack([cos, -sin, cos - sin])
        back = torch.stack([cos + sin, sin - cos, -sin])
        real = torch.tensor(_is_real(self.grid), device=spectrum.device)[frequency][:, None]
        select = torch.arange(len(kept), device=spectrum.device)
        weight = torch.where(real, 1.0, 2.0).double() / (h * w)
        self._keep(
            table=into[kind, select],
            table_out=(back[kind, select] * weight).T,
            matrices=_gauss(spectrum)[kind, frequency].mT,
        )

    def _apply_tables(self, x: Tensor) -> Tensor:
        x_hat = self.table @ x.flatten(0, 1)
        y_hat = x_hat.reshape(self.table.shape[0], -1, self.in_channels) @ self.matrices
        return self.table_out @ y_hat.flatten(1)


class _Separable(_Fourier):
    """One table for each axis, and three matrices for every frequency of the half plane."""

    across: Tensor
    across_out: Tensor
    down: Tensor
    down_out: Tensor

    def _make_tables(self, spectrum: Tensor) -> None:
        h, w = self.grid
        angle = phases(w // 2 + 1, w, self.columns, spectrum.device)
        multiplicity = angle.new_full((w // 2 + 1, 1), 2 / (h * w))
        multiplicity[0] /= 2
        if w % 2 == 0:
            multiplicity[-1] /= 2
        wave = torch.cat([angle.cos(), -angle.sin()])
        angle = phases(h, h, self.rows, spectrum.device)
        cos, sin = angle.cos(), angle.sin()
        from_real = torch.cat([cos, -sin, cos - sin])
        from_imaginary = torch.cat([sin, cos, cos + sin])
        to_real = torch.cat([cos + sin, sin - cos, -sin])
        to_imaginary = torch.cat([sin - cos, -sin - cos, cos])
        self._keep(
            across=wave,
            across_out=(wave * multiplicity.repeat(2, 1)).T,
            down=torch.stack([from_real, from_imaginary], dim=2).flatten(1),
            down_out=torch.stack([to_real, to_imaginary], dim=2).flatten(1).T,
            matrices=_gauss(spectrum).flatten(0, 1).mT,
        )

    def _apply_tables(self, x: Tensor) -> Tensor:
        h, half = self.map_size[0], self.grid[1] // 2 + 1
        lines = (self.across @ x).reshape(2 * h, -1)
        x_hat = (self.down @ lines).reshape(3 * self.grid[0] * half, -1, self.in_channels)
        y_hat = (x_hat @ self.matrices).reshape(3 * self.grid[0], -1)
        return self.across_out @ (self.down_out @ y_hat).reshape(h, 2 * half, -1)


class _Dense(_Fourier):
    """One matrix on the flattened map, (out h w, in h w)."""

    def _make_tables(self, spectrum: Tensor) -> None:
        h, w = self.grid
        values = torch.complex(*spectrum.unbind(1)).unflatten(0, (h, w // 2 + 1))
        taps = torch.fft.irfft2(values.permute(2, 3, 0, 1), s=(h, w))
        rows, columns = (
            torch.tensor(positions, device=spectrum.device)
            for positions in (self.rows, self.columns)
        )
        down = (rows[:, None] - rows) % h
        across = (columns[:, None] - columns) % w
        matrix = taps[:, :, down[:, None, :, None], across[None, :, None, :]]
        self._keep(matrices=matrix.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2).T)
        if self.bias is not None:
            self.bias = self.bias.repeat_interleave(self.map_size[0] * self.map_size[1])

    def forward(self, x: Tensor) -> Tensor:
        assert_map_size(x, self.map_size)
        y = x.flatten(-3).to(self.dtype) @ self.matrices
        return self._biased(y.to(x.dtype)).unflatten(-1, (self.out_channels, *self.map_size))


def _gauss(spectrum: Tensor) -> Tensor:
    """(3, F, out, in): the real parts, the imaginary parts, and their sums."""
    real, imaginary = spectrum.unbind(1)
    return torch.stack([real, imaginary, real + imaginary])


def _is_real(grid: tuple[int, int]) -> list[bool]:
    """Whether a frequency of the half plane is its own conjugate."""
    h, w = grid
    return [2 * y % h == 0 and 2 * x % w == 0 for y in range(h) for x in range(w // 2 + 1)]


def _kept(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """(kind of matrix, frequency in the half plane), one frequency of each conjugate pair."""
    h, w = grid
    half = w // 2 + 1
    real = _is_real(grid)
    pairs = []
    for frequency in range(h * half):
        y, x = divmod(frequency, half)
        if 2 * x % w or 2 * y <= h:
            pairs += [(kind, frequency) for kind in range(1 if real[frequency] else 3)]
    return pairs
