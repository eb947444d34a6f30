"""BCOP: block convolution orthogonal parameterisation (Li et al., NeurIPS 2019)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lipfast import reference

from .base import SoundWeights
from .kernel import KernelModule, as_kernel
from .layers import LipschitzConv2d, LipschitzLinear

_ITERATIONS = 20


class BCOPConv2d(KernelModule, LipschitzConv2d):
    """Orthogonal convolution composed of a matrix and 2 (k - 1) projectors.

    The weight (2k - 1, c, c), c = max(in_channels, out_channels), is orthogonalised by 20
    Bjorck-Bowie steps in one batch; the first min(in, out) rows of one matrix give the 1x1 kernel,
    half of the columns of each other one a projector (Li et al. 2019, algorithm 1). Where
    out_channels > in_channels the kernel is that of the adjoint layer, transposed. The bound holds
    for zero and circular padding and every map size, converged or not: in evaluation mode a last
    step in float64 makes each matrix a contraction. See `LipschitzConv2d` for the arguments.
    """

    _padding_modes = ("circular", "zeros")

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        c = max(self.in_channels, self.out_channels)
        self.weight = nn.Parameter(torch.empty(2 * self.kernel_size[0] - 1, c, c, **factory))
        self._register_bias(self.out_channels if bias else None, factory)

    def _kernel_parameter(self) -> Tensor:
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))

    def _training_weights(self, map_size: tuple[int, int]) -> tuple[Tensor, ...]:
        return (self._compose(_orthogonalise(self._kernel_parameter())),)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        matrices, bound = reference.contract(_orthogonalise(self._kernel_parameter().double()))
        # P = R R^T has eigenvalues in [0, bound^2] and |P + (I - P) z| <= max(1, 2 bound^2 - 1)
        block = (2 * bound**2 - 1).clamp_min(1)
        bound = bound * block ** (len(matrices) - 1)
        kernel, bound = reference.round_contraction(
            self._compose(matrices), bound, self.weight.dtype
        )
        return SoundWeights((kernel,), bound)

    def _compose(self, matrices: Tensor) -> Tensor:
        rows = min(self.in_channels, self.out_channels)
        half = matrices[1:, :, : matrices.shape[-1] // 2]
        kernel = reference.block_conv(matrices[0, :rows], half @ half.mT)
        if self.out_channels > self.in_channels:
            return reference.transpose_kernel(kernel)
        return kernel

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal matrices / sqrt(c); zero bias."""
        for matrix in self.weight:
            matrix.copy_(nn.init.orthogonal_(torch.empty(matrix.shape)) / math.sqrt(len(matrix)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class BCOPLinear(KernelModule, LipschitzLinear):
    """Linear layer with an orthogonal matrix from 20 Bjorck-Bowie steps (Li et al. 2019).

    Rows are orthonormal where out_features <= in_features, columns otherwise. Converged or not,
    the layer is 1-Lipschitz. See `LipschitzLinear` for the arguments.
    """

    def _training_weights(self, map_size: tuple[int, int]) -> tuple[Tensor, ...]:
        return (_orthogonalise(as_kernel(self.weight)[:, :, 0, 0])[:, :, None, None],)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        matrix = as_kernel(self.weight).double()[:, :, 0, 0]
        matrix, bound = reference.contract(_orthogonalise(matrix))
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


def _orthogonalise(matrices: Tensor) -> Tensor:
    """Bjorck steps from the matrix divided by an upper bound of its norm, a constant."""
    scaled, _ = reference.unit_scale(matrices, dim=(-2, -1))
    norm = reference.schatten_bound(scaled.detach())
    scaled = scaled * reference.inverse_or_zero(norm)[..., None, None]
    return reference.bjorck(scaled, iterations=_ITERATIONS)
