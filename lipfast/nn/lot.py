"""LOT: layer-wise orthogonal training (Xu et al., NeurIPS 2022)."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lipfast import backends, reference

from .aol import initialise_dirac_or_orthogonal
from .convergence import PolarModule
from .layers import LipschitzConv2d, LipschitzLinear
from .spectral import SpectralModule

_PUBLISHED_RIDGE = 1e-4


class _LOT(PolarModule, SpectralModule):
    def __init__(self, *args: Any, ridge: float = 0.0, **kwargs: Any) -> None:
        number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
        if not number or not 0 <= ridge < math.inf:
            raise ValueError(
                f"ridge: {type(self).__name__} expected a finite number >= 0, got {ridge!r}"
            )
        super().__init__(*args, **kwargs)
        self.ridge = float(ridge)

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.ridge)

    def _normalised(self, layers: Sequence[Any], kernels: Tensor) -> tuple[Tensor, Tensor]:
        kernels, scale = reference.unit_scale(kernels, minimum=1.0, dim=(1, 2, 3, 4))
        return kernels, scale.flatten()

    def _orthogonalise(
        self,
        layers: Sequence[Any],
        matrices: Tensor,
        scale: Tensor,
        planar: bool,
        backend: str | None,
    ) -> Tensor:
        published = backends.forced() == "reference"
        ridge: float | Tensor = _PUBLISHED_RIDGE if published else self.ridge
        if ridge:
            ridge = ridge / scale**2
            ridge = ridge[:, None] if planar else ridge
        return self._polar(layers, matrices, backend, planar=planar, ridge=ridge)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identity where the channels are equal, else an orthogonal centre tap; zero bias."""
        kernel = self.weight if self.weight.dim() == 4 else self.weight[:, :, None, None]
        initialise_dirac_or_orthogonal(kernel)
        if self._inner_channels == self.out_channels:
            kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2] = torch.eye(self.out_channels)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", ridge={self.ridge}" if self.ridge else "")


class LOTConv2d(_LOT, LipschitzConv2d):
    """Convolution made orthogonal per frequency, V -> (V V^H + ridge I)^(-1/2) V.

    The polar factor at each frequency of the real Fourier transform (Xu et al. 2022, algorithm 1),
    by `ops.polar`; on `padding_mode="zeros"`, the published form, the map gets kernel_size // 2
    zeros on each side before the circular convolution and is cropped afterwards. No singular value
    exceeds 1, so that the layer is 1-Lipschitz, converged or not; in evaluation mode a last step in
    float64 proves it. Any in_channels and out_channels, any map size.

    Takes the arguments of `LipschitzConv2d`, and

    Args:
        ridge: a keyword: 0 for orthogonal layers, 1e-4 for weights that were trained with the
            published code. It runs ten coupled Newton steps, as does `lipfast.backend("reference")`
            whatever the ridge.
    """


class LOTLinear(_LOT, LipschitzLinear):
    """Linear layer with the matrix (V V^T + ridge I)^(-1/2) V.

    Rows are orthonormal where out_features <= in_features, columns otherwise (Xu et al. 2022,
    algorithm 1). Takes the arguments of `LipschitzLinear`, and the `ridge` of `LOTConv2d`.
    """
