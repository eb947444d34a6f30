"""LOT: layer-wise orthogonal training (Xu et al., NeurIPS 2022)."""

import torch
from torch import Tensor, nn

from lipfast import reference

from .aol import initialise_dirac_or_orthogonal
from .layers import LipschitzConv2d, LipschitzLinear
from .spectral import SpectralModule

_ITERATIONS = 10
_RIDGE = 1e-4


class _LOT(SpectralModule):
    def _normalised(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        return reference.unit_scale(kernel, minimum=1.0)

    def _orthogonalise(self, matrices: Tensor, scale: Tensor) -> Tensor:
        return reference.polar(matrices, iterations=_ITERATIONS, ridge=_RIDGE / scale**2)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identity where the channels are equal, else an orthogonal centre tap; zero bias."""
        kernel = self.weight if self.weight.dim() == 4 else self.weight[:, :, None, None]
        initialise_dirac_or_orthogonal(kernel)
        if self.in_channels == self.out_channels:
            kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2] = torch.eye(self.out_channels)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LOTConv2d(_LOT, LipschitzConv2d):
    """Convolution made orthogonal per frequency, (V V^H + 1e-4 I)^(-1/2) V by Newton iteration.

    Ten coupled Newton steps at each frequency of the real Fourier transform (Xu et al. 2022,
    algorithm 1); on `padding_mode="zeros"`, the published form, the map gets kernel_size // 2
    zeros on each side before the circular convolution and is cropped afterwards. Singular values
    approach 1 from below, so that the layer is 1-Lipschitz, converged or not; in evaluation mode a
    last step in float64 proves it. Any in_channels and out_channels, any map size. See
    `LipschitzConv2d` for the arguments.
    """


class LOTLinear(_LOT, LipschitzLinear):
    """Linear layer with the matrix (V V^T + 1e-4 I)^(-1/2) V by Newton iteration.

    Rows are near orthonormal where out_features <= in_features, columns otherwise (Xu et al. 2022,
    algorithm 1). See `LipschitzLinear` for the arguments.
    """
