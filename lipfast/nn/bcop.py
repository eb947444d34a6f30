"""BCOP: block convolution orthogonal parameterisation (Li et al., NeurIPS 2019)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipfast import ops, reference

from .base import SoundWeights
from .convergence import PolarModule
from .kernel import sound_backend, stacked, stacked_kernels
from .layers import LipschitzConv2d, LipschitzLinear


class BCOPConv2d(PolarModule, LipschitzConv2d):
    """Orthogonal convolution composed of a matrix and 2 (k - 1) projectors.

    The weight (2k - 1, c, c), c = max(in_channels, out_channels), is replaced by its polar factors
    in one batch; the first min(in, out) rows of one matrix give the 1x1 kernel, half of the columns
    of each other one a projector (Li et al. 2019, algorithm 1). Where out_channels > in_channels
    the kernel is that of the adjoint layer, transposed. The bound holds for zero and circular
    padding and every map size, converged or not: in evaluation mode a last step in float64 makes
    each matrix a contraction. See `LipschitzConv2d` for the arguments.
    """

    _padding_modes = ("circular", "zeros")

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        c = max(self._inner_channels, self.out_channels)
        self.weight = nn.Parameter(torch.empty(2 * self.kernel_size[0] - 1, c, c, **factory))
        self._register_bias(self.out_channels if bias else None, factory)
        self._register_residual(factory)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        matrices = stacked([layer.weight for layer in layers])
        matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
        return (self._compose(self._polar(layers, matrices, None, form="bjorck"), None),)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        backend = sound_backend(self.weight)
        matrices = self._polar([self], self.weight.double(), backend, form="bjorck")
        matrices, bound = reference.contract(matrices)
        # P = R R^T has eigenvalues in [0, bound^2] and |P + (I - P) z| <= max(1, 2 bound^2 - 1)
        block = (2 * bound**2 - 1).clamp_min(1)
        bound = bound * block ** (len(matrices) - 1)
        kernel = self._compose(matrices, backend)
        kernel, bound = reference.round_contraction(kernel, bound, self.weight.dtype)
        return SoundWeights((kernel,), bound)

    def _compose(self, matrices: Tensor, backend: str | None) -> Tensor:
        """The kernel of (2k - 1, c, c), or those of (layers, 2k - 1, c, c)."""
        rows = min(self._inner_channels, self.out_channels)
        halves = matrices[..., 1:, :, : matrices.shape[-1] // 2]
        kernel = ops.block_conv(matrices[..., 0, :rows, :], halves, backend=backend)
        if self.out_channels > self._inner_channels:
            return reference.transpose_kernel(kernel)
        return kernel

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal matrices / sqrt(c); zero bias."""
        for matrix in self.weight:
            matrix.copy_(nn.init.orthogonal_(torch.empty(matrix.shape)) / math.sqrt(len(matrix)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BjorckLinear(PolarModule, LipschitzLinear):
    """Linear layer with an orthogonal matrix, the polar factor of its weight (Li et al. 2019).

    Rows are orthonormal where out_features <= in_features, columns otherwise. Converged or not,
    the layer is 1-Lipschitz. See `LipschitzLinear` for the arguments. `BCOPLinear` is another name
    of this class.
    """

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        matrices = stacked_kernels(layers)[..., 0, 0]
        return (self._polar(layers, matrices, None, form="bjorck")[..., None, None],)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        backend = sound_backend(self.weight)
        matrix = self._polar([self], self.weight.double(), backend, form="bjorck")
        matrix, bound = reference.contract(matrix)
        kernel, bound = reference.round_contraction(
            matrix[:, :, None, None], bound, self.weight.dtype
        )
        return SoundWeights((kernel,), bound)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal matrix; zero bias."""
        self.weight.copy_(nn.init.orthogonal_(torch.empty(self.weight.shape)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


BCOPLinear = BjorckLinear
