"""The layers of deel-torchlip (Serrurier et al., CVPR 2021)."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lipfast import ops, reference
from lipfast.nn.base import SoundWeights
from lipfast.nn.kernel import KernelModule, as_kernel, write_buffers
from lipfast.nn.maxmin import MaxMin
from lipfast.ops.context import inside_transforms

from .peers import PatchConv2d, PeerLinear, chain, sound_windows
from .torchlip_bjorck import stopped_bjorck

_SQUARINGS = 11  # as many as the bound of a plain linear layer takes


class TorchlipMinMax(MaxMin):
    """Order each pair of channels (2i, 2i + 1) as (min, max), times `coefficient` (GroupSort2)."""

    def __init__(self, coefficient: float = 1.0) -> None:
        super().__init__()
        self.coefficient = coefficient

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (n, c, ...)."""
        return ops.maxmin(-x) * -self.coefficient

    def lipschitz_bound(self) -> float:
        """Return the coefficient: the map only permutes."""
        return abs(self.coefficient)

    def to_plain(self, channels: int | None = None) -> nn.Module:
        """Return an equivalent module of torch operations; see `lipfast.nn.MaxMin.to_plain`."""
        return fx.symbolic_trace(_PlainMinMax(super().to_plain(channels), self.coefficient))

    def extra_repr(self) -> str:
        return f"coefficient={self.coefficient}"


class _PlainMinMax(nn.Module):
    def __init__(self, maxmin: nn.Module, coefficient: float) -> None:
        super().__init__()
        self.maxmin, self.coefficient = maxmin, coefficient

    def forward(self, x: Tensor) -> Tensor:
        return self.maxmin(-x) * -self.coefficient


class _Scaled(KernelModule):
    """A layer whose matrix (out, in kh kw) is normalised, and multiplied by `factor`."""

    def __init__(self, *args: Any, factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.factor)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        matrices = [layer._normalised(as_kernel(layer.weight).flatten(1)) for layer in layers]
        shape = as_kernel(self.weight).shape
        return (torch.stack([matrix.view(shape) for matrix in matrices]) * self.factor,)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        matrix, bound = self._sound_matrix()
        kernel = matrix.view(as_kernel(self.weight).shape) * self.factor
        return sound_windows(self, kernel, bound * abs(self.factor), map_size)

    def _normalised(self, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    def _sound_matrix(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class _Spectral(_Scaled):
    def __init__(self, *args: Any, tolerance: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tolerance = tolerance

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.tolerance)

    def _normalised(self, matrix: Tensor) -> Tensor:
        # torch's spectral normalisation, which keeps its vectors
        power_iteration, kept, *_ = chain(self)[0]
        normalised = power_iteration(matrix.to(kept._w_bjorck.dtype)).to(matrix.dtype)
        matrix = stopped_bjorck(normalised, self.tolerance)
        if not inside_transforms():
            write_buffers([kept._w_bjorck], [matrix.detach().view(kept._w_bjorck.shape)])
        return matrix

    def _sound_matrix(self) -> tuple[Tensor, Tensor]:
        _, kept, *_ = chain(self)[0]
        return reference.contract(kept._w_bjorck.double().flatten(1))


class TorchlipSpectralLinear(_Spectral, PeerLinear):
    """Linear layer with an orthogonal matrix by spectral normalisation and Bjorck's iteration.

    Times `factor`. In evaluation mode the matrix is that of the last forward pass in training, as
    in the source, after one more step in float64 that makes it a contraction.
    """


class TorchlipSpectralConv2d(_Spectral, PatchConv2d):
    """Convolution whose kernel is orthogonal as a matrix (out, in kh kw), times `factor`.

    See `TorchlipSpectralLinear` for the evaluation mode.
    """


class _Frobenius(_Scaled):
    def __init__(self, *args: Any, disjoint: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.disjoint = disjoint

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.disjoint)

    def _normalised(self, matrix: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(matrix, dim=1 if self.disjoint else None, keepdim=True)
        return matrix * reference.inverse_or_zero(norm)

    def _sound_matrix(self) -> tuple[Tensor, Tensor]:
        matrix = self._normalised(as_kernel(self.weight).double().flatten(1))
        return matrix, reference.schatten_bound(matrix, squarings=_SQUARINGS)


class TorchlipFrobeniusLinear(_Frobenius, PeerLinear):
    """Linear layer with a matrix, or for `disjoint` each row of it, of Frobenius norm `factor`.

    With `disjoint` each output is 1-Lipschitz for a factor of 1, and the layer with more than one
    output is not: `lipschitz_bound()` says how far it is from it.
    """


class TorchlipFrobeniusConv2d(_Frobenius, PatchConv2d):
    """Convolution whose kernel has Frobenius norm `factor`."""
