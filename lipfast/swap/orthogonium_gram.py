"""AOL and SLL layers of orthogonium, and its activation (Boissin et al., 2025)."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lipfast import ops, reference
from lipfast.nn.aol import _AOL
from lipfast.nn.base import SoundWeights
from lipfast.nn.kernel import as_kernel, gram_backend, stacked, stacked_kernels
from lipfast.nn.layers import LipschitzConv2d
from lipfast.nn.maxmin import MaxMin
from lipfast.nn.residual import _Q_MINIMUM, ResidualModule, SLLLinear, _round_down

from .peers import PeerConv2d, stored


class HalvesMaxMin(MaxMin):
    """Order each pair (i, i + c / 2) of c channels along `axis` as (max, min)."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to a tensor of any shape with an even number of channels."""
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] % 2:
            raise ValueError(
                f"input: HalvesMaxMin expected an even number of channels in dimension "
                f"{self.axis}, got shape {tuple(x.shape)}"
            )
        axis = self.axis % x.dim()
        turned = axis == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if turned:
            x, axis = x.movedim(1, -1), 3
        # in memory each half is one piece: they are the two channels of a view
        pieces = (math.prod(x.shape[:axis]), 2, math.prod(x.shape[axis:]) // 2)
        y = ops.maxmin(x.contiguous().view(pieces)).view(x.shape)
        return y.movedim(-1, 1) if turned else y

    def to_plain(self, channels: int | None = None) -> nn.Module:
        """Return an equivalent module of torch operations; `channels` makes no difference."""
        return fx.symbolic_trace(_PlainHalves(self.axis))

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class _PlainHalves(nn.Module):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, self.axis)
        return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], self.axis)


class OrthogoniumAOLConv2d(_AOL, PeerConv2d):
    """AOL convolution that rescales the smaller one of its numbers of channels.

    P diag(d) where out_channels >= in_channels, else diag(d) P, d = r^(-1/2) with the row sums r of
    the Gram operator of those channels (Prach and Lampert 2022, theorem 2, and for the adjoint).
    """

    q: nn.Parameter

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        super()._make_parameters(bias, factory)
        channels = min(self.in_channels, self.out_channels)
        self.q = nn.Parameter(torch.empty(channels, 1, 1, 1, **factory))

    @property
    def _axis(self) -> str:
        return "in" if self.out_channels >= self.in_channels else "out"

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        kernels, _ = reference.unit_scale(stacked_kernels(layers), dim=(1, 2, 3, 4))
        rows = ops.gram_bound(kernels, axis=self._axis, groups=self.groups, backend=gram_backend())
        rows = rows + _zero(layers, rows)
        if self._axis == "in":
            return kernels, rows
        return (kernels * reference.inverse_or_zero(rows, power=0.5)[..., None, None, None],)

    def _for_input(self, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(weights) == 2:
            return super()._for_input(x, weights)
        return PeerConv2d._for_input(self, x, weights)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        weight, _ = reference.unit_scale(as_kernel(self.weight).double())
        rescaling = reference.inverse_or_zero(self._row_sums(weight), power=0.5)
        q = torch.where(rescaling > 0, 1 / rescaling, 1)
        if self._axis == "in":
            kernel = self._scale_inputs(weight, rescaling)
        else:
            kernel = weight * rescaling[:, None, None, None]
        bound = self._row_sums(kernel, q).amax().sqrt()
        return SoundWeights(*stored(kernel, bound, self.weight.dtype))

    def _row_sums(self, kernel: Tensor, q: Tensor | None = None) -> Tensor:
        return ops.gram_bound(kernel, q, axis=self._axis, groups=self.groups, backend="reference")


class OrthogoniumSLLConv2d(ResidualModule, LipschitzConv2d):
    """Residual layer x - 2 K^T relu(K x + b), K = diag(d) W, d as AOL has it for its rows."""

    q: nn.Parameter

    def __init__(self, *args: Any, hidden: int, **kwargs: Any) -> None:
        self.hidden = hidden
        super().__init__(*args, **kwargs)

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        shape = (self.hidden, self.in_channels, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self._register_bias(self.hidden if bias else None, factory)
        self.q = nn.Parameter(torch.empty(self.hidden, 1, 1, 1, **factory))

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.hidden)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        kernels, _ = reference.unit_scale(stacked_kernels(layers), dim=(1, 2, 3, 4))
        rows = ops.gram_bound(kernels, axis="out", backend=gram_backend())
        rows = rows + _zero(layers, rows)
        kernels = kernels * reference.inverse_or_zero(rows, power=0.5)[..., None, None, None]
        return (
            kernels,
            self._scaled_bias(layers, torch.ones_like(rows)),
            rows.new_full((len(layers),), 2.0),
        )

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        dtype = self.weight.dtype
        weight, _ = reference.unit_scale(as_kernel(self.weight).double())
        rows = ops.gram_bound(weight, axis="out", backend="reference")
        factors = reference.inverse_or_zero(rows, power=0.5)
        kernel = (weight * factors[:, None, None, None]).to(dtype)
        q = torch.where(factors > 0, 1 / factors, 1)
        rows = ops.gram_bound(kernel.double(), q, axis="out", backend="reference")
        t = _round_down((2 * reference.inverse_or_zero(rows)).clamp_max(2), dtype)
        bound = (t.double() * rows - 1).amax().clamp_min(1)
        bias = self._scaled_bias([self], torch.ones_like(rows)[None])[0]
        return SoundWeights((kernel, bias.to(dtype), t), bound)


class OrthogoniumSLLLinear(SLLLinear):
    """SLL layer on vectors with any hidden width, and exp(q) in the place of abs(q)."""

    def __init__(self, *args: Any, hidden: int, **kwargs: Any) -> None:
        self.hidden = hidden
        super().__init__(*args, **kwargs)

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        self.weight = nn.Parameter(torch.empty(self.hidden, self.in_channels, **factory))
        self._register_bias(self.hidden if bias else None, factory)
        self.q = nn.Parameter(torch.empty(self.hidden, **factory))

    def _run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        # on a CPU several times faster than the convolutions of 1 x 1 maps
        kernel, bias, scale = weights
        matrix, vectors = kernel.flatten(1), x.flatten(1)
        hidden = F.linear(vectors, matrix, bias.to(matrix.dtype)).relu() * scale
        y = vectors - F.linear(hidden, matrix.mT).to(vectors.dtype)
        return y[:, :, None, None]

    def _row_sums(
        self, layers: Sequence[Any], kernels: Tensor, scale: Tensor, backend: str | None
    ) -> Tensor:
        scale = scale * kernels.detach().abs().amax(dim=(2, 3, 4))  # the largest tap: 1, or 0
        logarithms = stacked([layer.q for layer in layers]).to(kernels.dtype)
        q = (logarithms - logarithms.detach().amax(dim=1, keepdim=True)).exp()
        q = q * reference.unit_scale(scale, dim=(1,))[0]
        q = reference.unit_scale(q, dim=(1,))[0].clamp_min(_Q_MINIMUM)
        # for matrices two products are all there is to it, and faster than the op's bookkeeping
        matrices = kernels.flatten(2)
        gram = (matrices @ matrices.mT).abs()
        return (gram @ q[..., None]).squeeze(-1) / q


def _zero(layers: Sequence[Any], rows: Tensor) -> Tensor:
    """Zeros that depend on q, which cancels: its gradient is 0 and not None, as in the source."""
    return 0 * stacked([layer.q for layer in layers]).flatten(1).to(rows.dtype)
