"""Layers that are orthogonalised frequency by frequency (LOT, Cayley)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import ops, reference

from .base import SoundWeights
from .kernel import KernelModule, sound_backend, stacked_kernels
from .plain_fourier import plain_fourier


class SpectralModule(KernelModule):
    """A circular convolution whose transfer matrices are orthogonalised one by one.

    Its weights are planar: (F, 2, out, in), the real and the imaginary parts. A kernel of one tap
    has one real transfer matrix and needs no Fourier transform.
    """

    @property
    def _depends_on_map_size(self) -> bool:  # type: ignore[override]
        return self.kernel_size != (1, 1)

    def _orthogonalise(
        self,
        layers: Sequence[Any],
        matrices: Tensor,
        scale: Tensor,
        planar: bool,
        backend: str | None,
    ) -> Tensor:
        """Return matrices with singular values at most 1 from `matrices` * scale, layer by layer.

        They are planar, (layers, F, 2, out, in), or real, (layers, out, in); scale (layers,);
        `backend` is None in training.
        """
        raise NotImplementedError

    def _normalised(self, layers: Sequence[Any], kernels: Tensor) -> tuple[Tensor, Tensor]:
        """Return kernels / s and s (layers,): what the transform sees and what it must know."""
        raise NotImplementedError

    def _transfer_matrices(
        self,
        layers: Sequence[Any],
        kernels: Tensor,
        map_size: tuple[int, int],
        backend: str | None,
    ) -> Tensor:
        kernels, scale = self._normalised(layers, kernels)
        if not self._depends_on_map_size:
            return self._orthogonalise(layers, kernels[..., 0, 0], scale, False, backend)
        spectrum = ops.kernel_spectrum(kernels, self._grid(map_size))
        return self._orthogonalise(layers, spectrum, scale, True, backend)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        matrices = self._transfer_matrices(layers, stacked_kernels(layers), map_size, None)
        return (matrices if self._depends_on_map_size else matrices[..., None, None],)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernels = stacked_kernels([self]).double()
        backend = sound_backend(self.weight)
        matrices = self._transfer_matrices([self], kernels, map_size, backend)[0]
        if self._depends_on_map_size:
            matrices = torch.complex(*matrices.unbind(1))
        matrices, bound = reference.contract(matrices)
        if not self._depends_on_map_size:
            matrices = matrices[:, :, None, None]
        weight, bound = reference.round_contraction(matrices, bound, self.weight.dtype)
        if self._depends_on_map_size:
            weight = torch.stack([weight.real, weight.imag], dim=1)
        return SoundWeights((weight,), bound)

    def _weight_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """At least float32, as the Fourier transform of x has."""
        return torch.promote_types(dtype, torch.float32) if self._depends_on_map_size else dtype

    def _padding(self) -> tuple[int, int]:
        """Zeros added to each side of the map before the circular convolution."""
        if self.padding_mode == "circular":
            return (0, 0)
        return (self.kernel_size[0] // 2, self.kernel_size[1] // 2)

    def _grid(self, map_size: tuple[int, int]) -> tuple[int, int]:
        ph, pw = self._padding()
        return (map_size[0] + 2 * ph, map_size[1] + 2 * pw)

    def _run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if not self._depends_on_map_size:
            return super()._run(x, weights)
        (ph, pw), (h, w) = self._padding(), x.shape[-2:]
        if ph == pw == 0:
            y = ops.fourier_conv(x, weights[0])
        else:
            y = ops.fourier_conv(F.pad(x, (pw, pw, ph, ph)), weights[0])
            y = y[..., ph : ph + h, pw : pw + w]
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def effective_kernel(self, input_size: tuple[int, int] | None = None) -> Tensor:
        """Return the circular kernel (out, in, h, w) on the map, or the matrix of a 1x1 kernel.

        Tap [h // 2, w // 2] is the centre. With zero padding the map is the input with
        kernel_size // 2 zeros on each side, and the output is cropped to the input's size. With
        stride s the input is `torch.nn.PixelUnshuffle(s)` of the layer's, in = s^2 in_channels.
        """
        if not self._depends_on_map_size:
            return super().effective_kernel(input_size)
        map_size = self._map_size(input_size)
        h, w = self._grid(map_size)
        (spectrum,) = self._sound(map_size).weights
        grid = torch.complex(*spectrum.unbind(1)).unflatten(0, (h, w // 2 + 1))
        taps = torch.fft.irfft2(grid.permute(2, 3, 0, 1), s=(h, w))
        rows = (h // 2 - torch.arange(h, device=taps.device)) % h
        columns = (w // 2 - torch.arange(w, device=taps.device)) % w
        return taps[..., rows, :][..., columns]

    def _plain(
        self,
        weights: tuple[Tensor, ...],
        map_size: tuple[int, int],
        channels: tuple[int, int] | None = None,
    ) -> nn.Module:
        if not self._depends_on_map_size:
            return super()._plain(weights, map_size, channels)
        inputs, outputs = channels or (self._inner_channels, self.out_channels)
        spectrum = weights[0][:, :, :outputs, :inputs]
        bias = None if self.bias is None else self.bias[:outputs]
        return plain_fourier(spectrum, bias, map_size, self._padding())
