"""AOL: almost-orthogonal layers (Prach and Lampert, ECCV 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipfast import ops, reference

from .base import SoundWeights
from .kernel import (
    KernelModule,
    as_kernel,
    gram_backend,
    is_channels_last,
    matched_dtype,
    stacked_kernels,
)
from .layers import LipschitzConv2d, LipschitzLinear

_EPSILON = 1e-6


class _AOL(KernelModule):
    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """The kernels P before their rescaling, and the row sums."""
        kernels = stacked_kernels(layers)
        weight, scale = reference.unit_scale(kernels, minimum=1.0, dim=(1, 2, 3, 4))
        rows = ops.gram_bound(weight, groups=self.groups, backend=gram_backend())
        return weight, rows + _EPSILON / scale.view(-1, 1) ** 2

    def _for_input(self, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weight, rows = weights
        kernel = ops.aol_rescale(
            weight,
            rows,
            groups=self.groups,
            dtype=matched_dtype(x, weight),
            channels_last=is_channels_last(x),
            backend=gram_backend(),
        )
        return (kernel,)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        weight, scale = reference.unit_scale(as_kernel(self.weight).double(), minimum=1.0)
        rows = self._proved_rows(weight) + _EPSILON / scale**2
        rescaling = reference.inverse_or_zero(rows, power=0.5)
        kernel = self._scale_inputs(weight, rescaling)
        q = torch.where(rescaling > 0, 1 / rescaling, 1)
        bound = self._proved_rows(kernel, q).amax().sqrt()
        kernel, bound = reference.round_contraction(kernel, bound, self.weight.dtype)
        bound = torch.minimum(bound, self._proved_rows(kernel.double(), q).amax().sqrt())
        return SoundWeights((kernel,), bound)

    def _proved_rows(self, kernel: Tensor, q: Tensor | None = None) -> Tensor:
        return ops.gram_bound(kernel, q, groups=self.groups, backend="reference")

    def _scale_inputs(self, kernel: Tensor, factors: Tensor) -> Tensor:
        """Multiply the slices of (out, in / groups, kh, kw) that belong to an input channel."""
        blocks = kernel.unflatten(0, (self.groups, -1))
        return (blocks * factors.view(self.groups, 1, -1, 1, 1)).flatten(0, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Dirac kernel where channels are equal, else an orthogonal one; zero bias."""
        kernel = self.weight if self.weight.dim() == 4 else self.weight[:, :, None, None]
        for block in kernel.chunk(self.groups):
            initialise_dirac_or_orthogonal(block)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class AOLConv2d(_AOL, LipschitzConv2d):
    """Convolution whose input channels are rescaled so that its spectral norm is at most 1.

    The kernel is P diag(d), d_i = (sum_j sum_delta |G_delta|_ij + 1e-6)^(-1/2), G the
    self-correlation of the weight P (Prach and Lampert 2022, theorem 2). The bound holds for zero
    and circular padding and every map size, and is checked in float64 in evaluation mode.
    Any in_channels and out_channels, kernels of two different odd sizes, and any stride, dilation,
    groups and zero padding; circular padding of at most dilation * (kernel_size // 2): a subset of
    the outputs of the bounded convolution. See `LipschitzConv2d` for the other arguments.
    """

    _free_arguments = ("kernel_size", "stride", "padding", "dilation", "groups")
    _padding_modes = ("circular", "zeros")


class AOLLinear(_AOL, LipschitzLinear):
    """Linear layer whose inputs are rescaled so that its spectral norm is at most 1.

    The matrix is P diag(d), d_i = (sum_j |P^T P|_ij + 1e-6)^(-1/2) (Prach and Lampert 2022,
    theorem 1). Any in_features and out_features. See `LipschitzLinear` for the arguments.
    """


def initialise_dirac_or_orthogonal(kernel: Tensor) -> None:
    """Fill (out, in, kh, kw) with the identity, or with an orthogonal centre tap if out != in."""
    out_channels, in_channels, kh, kw = kernel.shape
    kernel.zero_()
    centre = kernel[:, :, kh // 2, kw // 2]
    if kh * kw > 1 and out_channels == in_channels:
        centre.copy_(torch.eye(out_channels))
    else:
        matrix = torch.empty(out_channels, in_channels)
        centre.copy_(nn.init.orthogonal_(matrix))
