"""Cayley layers (Trockman and Kolter, ICLR 2021)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipfast import ops, reference

from .kernel import stacked
from .layers import LipschitzConv2d, LipschitzLinear
from .spectral import SpectralModule

_ALPHA_LIMIT = 1e3  # beyond it (I + A)^(-1) is too ill conditioned for float32


class _Cayley(SpectralModule):
    alpha: nn.Parameter

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        super()._make_parameters(bias, factory)
        self.alpha = nn.Parameter(torch.empty((), **factory))

    def _normalised(self, layers: Sequence[Any], kernels: Tensor) -> tuple[Tensor, Tensor]:
        kernels, scale = reference.unit_scale(kernels, dim=(1, 2, 3, 4))
        norms = torch.linalg.vector_norm(kernels, dim=(1, 2, 3, 4))
        alpha = stacked([layer.alpha for layer in layers])
        alpha = alpha.to(kernels.dtype).clamp(-_ALPHA_LIMIT, _ALPHA_LIMIT)
        factors = alpha * reference.inverse_or_zero(norms)
        return kernels * factors.view(-1, 1, 1, 1, 1), scale.flatten()

    def _orthogonalise(
        self,
        layers: Sequence[Any],
        matrices: Tensor,
        scale: Tensor,
        planar: bool,
        backend: str | None,
    ) -> Tensor:
        return ops.cayley(matrices, planar=planar, backend=backend)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming uniform weight and uniform bias as in torch; alpha is the weight's norm."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.alpha.copy_(torch.linalg.vector_norm(self.weight.float()))
        initialise_uniform_bias(self)


class CayleyConv2d(_Cayley, LipschitzConv2d):
    """Circular convolution made orthogonal per frequency by the Cayley transform.

    With U, V the square and the remaining rows of a transfer matrix and A = U - U^H + V^H V, the
    new one is [(I + A)^(-1) (I - A); -2 V (I + A)^(-1)] (Trockman and Kolter 2021, section 4). The
    kernel is alpha W / norm_F(W) with a learned alpha, whose start is norm_F(W) and which counts as
    at most 1000. Any in_channels and out_channels, any map size; circular padding only. See
    `LipschitzConv2d` for the arguments.
    """

    _padding_modes = ("circular",)


class CayleyLinear(_Cayley, LipschitzLinear):
    """Linear layer with an orthogonal matrix from the Cayley transform of alpha W / norm_F(W).

    Rows are orthonormal where out_features <= in_features, columns otherwise (Trockman and Kolter
    2021, section 3). See `LipschitzLinear` for the arguments.
    """


def initialise_uniform_bias(module: nn.Module) -> None:
    """Fill the bias from U(-a, a), a = 1 / sqrt(fan-in of the weight), as torch does."""
    bias, weight = module.bias, module.weight
    if isinstance(bias, Tensor) and isinstance(weight, Tensor):
        limit = 1 / math.sqrt(weight[0].numel())
        nn.init.uniform_(bias, -limit, limit)
