"""The layers of orthogonium (Boissin et al., "An adaptive orthogonal convolution scheme", 2025)."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import ops, reference
from lipfast.nn.aol import _AOL
from lipfast.nn.base import SoundWeights
from lipfast.nn.convergence import PolarModule
from lipfast.nn.kernel import as_kernel, gram_backend, sound_backend, stacked, stacked_kernels
from lipfast.nn.layers import LipschitzConv2d
from lipfast.nn.maxmin import MaxMin
from lipfast.nn.residual import _Q_MINIMUM, ResidualModule, SLLLinear, _round_down
from lipfast.ops.context import inside_transforms

from .peers import PatchConv2d, PeerConv2d, stored

# the derivative of the schedule, since random matrices of c x c / 2 are no better conditioned than
# 6 : 1 where the source starts
_POLAR = {"form": "bjorck", "schedule": "5355nn", "derivative": "jvp"}


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

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


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


class OrthogoniumBlockConv2d(PolarModule, PeerConv2d):
    """Orthogonal convolution from 2 k matrices (c, c / 2), k - 1 pairs of them as projectors.

    With P_i the projector on the columns of matrix i, the kernel is that of (I - 2 P_0) (I - 2 P_1)
    behind blocks of a vertical and a horizontal pair [P, I - P] (Boissin et al. 2025).
    """

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        c = max(self.in_channels, self._block_channels) // self.groups
        shape = (self.groups, 2 * self._block_size, c, c // 2)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self._register_bias(self.out_channels if bias else None, factory)
        self._register_residual(factory)

    @property
    def _block_channels(self) -> int:
        return self.out_channels

    @property
    def _block_size(self) -> int:
        return self.kernel_size[0]

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        factors = _precise(stacked([layer.weight for layer in layers]))
        return (self._block(self._polar(layers, factors, None, **_POLAR), None),)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernel, bound = self._sound_block()
        return SoundWeights(*stored(kernel, bound, self.weight.dtype))

    def _sound_block(self) -> tuple[Tensor, Tensor]:
        backend = sound_backend(self.weight)
        factors = self._polar([self], self.weight.double()[None], backend, **_POLAR)
        factors, bound = reference.contract(factors)
        # P has eigenvalues in [0, bound^2]: I - 2 P and the blocks, see BCOPConv2d, have this norm
        norm = (2 * bound**2 - 1).clamp_min(1)
        return self._block(factors, backend)[0], norm ** (2 * self._block_size)

    def _block(self, factors: Tensor, backend: str | None) -> Tensor:
        return block_kernels(factors, self.in_channels, self._block_channels, backend)


class OrthogoniumPatchConv2d(PolarModule, PatchConv2d):
    """Convolution whose kernel, as a matrix of windows, is orthogonal, times `scale` (RKO)."""

    def __init__(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.scale)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        kernels = stacked_kernels(layers)
        factors = self._polar(layers, _windows(kernels, self.groups), None, **_POLAR)
        return (factors.view(kernels.shape) * self.scale,)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernel, bound = _sound_windows(self, self.weight)
        return self._rounded(kernel * self.scale, bound * abs(self.scale), map_size)


class OrthogoniumStridedConv2d(OrthogoniumBlockConv2d, PatchConv2d):
    """Orthogonal convolution with stride s: a block convolution, then an orthogonal one of s x s.

    Both are composed to one kernel (Boissin et al. 2025).
    """

    _patch = "stride"
    patch_weight: nn.Parameter

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        super()._make_parameters(bias, factory)
        shape = (self.out_channels, self._block_channels // self.groups, *self.stride)
        self.patch_weight = nn.Parameter(torch.empty(shape, **factory))

    @property
    def _block_channels(self) -> int:
        return max(self.in_channels, self.out_channels // (self.stride[0] * self.stride[1]))

    @property
    def _block_size(self) -> int:
        return max(1, self.kernel_size[0] - self.stride[0] + 1)

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.stride)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        (blocks,) = super()._stacked_weights(layers, map_size)
        residuals = [layer.polar_residual.clone() for layer in layers]
        patches = as_kernel(stacked([layer.patch_weight for layer in layers]))
        factors = self._polar(layers, _windows(patches, self.groups), None, **_POLAR)
        if not inside_transforms():
            with torch.no_grad():
                for layer, residual in zip(layers, residuals, strict=True):
                    layer.polar_residual.clamp_min_(residual)
        pairs = zip(blocks, factors.view(patches.shape), strict=True)
        return (torch.stack([self._composed(block, patch) for block, patch in pairs]),)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        block, norm = self._sound_block()
        patch, bound = _sound_windows(self, self.patch_weight)
        return self._rounded(self._composed(block, patch), norm * bound, map_size)

    def _composed(self, block: Tensor, patch: Tensor) -> Tensor:
        """The kernel of the convolution with `block`, followed by that with `patch`."""
        margins = (self.stride[0] - 1, self.stride[1] - 1)
        kernel = F.conv2d(
            block.transpose(0, 1), patch.flip(2, 3), padding=margins, groups=self.groups
        )
        return kernel.transpose(0, 1).contiguous()


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

    def _row_sums(
        self, layers: Sequence[Any], kernels: Tensor, scale: Tensor, backend: str | None
    ) -> Tensor:
        scale = scale * kernels.detach().abs().amax(dim=(2, 3, 4))  # the largest tap: 1, or 0
        logarithms = stacked([layer.q for layer in layers]).to(kernels.dtype)
        q = (logarithms - logarithms.detach().amax(dim=1, keepdim=True)).exp()
        q = q * reference.unit_scale(scale, dim=(1,))[0]
        q = reference.unit_scale(q, dim=(1,))[0].clamp_min(_Q_MINIMUM)
        return ops.gram_bound(kernels, q, axis="out", backend=backend)


def block_kernels(
    factors: Tensor, in_channels: int, out_channels: int, backend: str | None
) -> Tensor:
    """Return kernels (n, out, in / groups, k, k) of orthonormal factors (n, groups, 2 k, c, c / 2).

    The transposed kernel is a row of right factors: (I - 2 P_1) (I - 2 P_0), then for each block
    its horizontal and its vertical pair, the order of `ops.block_conv` with the axes exchanged.
    """
    layers, groups, number, c, _ = factors.shape
    factors = factors.flatten(0, 1)
    size = number // 2
    rows = min(in_channels, out_channels) // groups
    first, second, blocks = factors[:, 0], factors[:, 1], factors[:, 2:]
    factor = torch.eye(rows, c, dtype=factors.dtype, device=factors.device)
    factor = factor - 2 * second[:, :rows] @ second.mT
    factor = factor - 2 * (factor @ first) @ first.mT
    if size > 1:
        order = _block_order(size - 1)
        columns = [index for block in order for index in (size - 1 + block, block)]
        kernels = ops.block_conv(factor, blocks[:, columns], backend=backend).transpose(3, 4)
    else:
        kernels = factor[..., None, None]
    if out_channels >= in_channels:
        kernels = kernels.transpose(1, 2)
    return kernels.unflatten(0, (layers, groups)).flatten(1, 2).contiguous()


def _block_order(number: int) -> list[int]:
    """The order in which the source's pairwise composition applies its blocks."""
    parts = [[index] for index in range(number)]
    while len(parts) > 1 and len(parts) % 2 == 0:
        half = len(parts) // 2
        parts = [first + second for first, second in zip(parts[:half], parts[half:], strict=True)]
    return [index for part in parts for index in part]


def _precise(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _windows(kernels: Tensor, groups: int) -> Tensor:
    """Kernels (layers, out, in / groups, kh, kw) as (layers, groups, out / groups, columns)."""
    return kernels.flatten(2).unflatten(1, (groups, -1))


def _sound_windows(layer: PatchConv2d, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel that is orthogonal as a matrix of windows, in float64, and a bound of its norm."""
    matrices = _windows(weight.double()[None], layer.groups)
    matrices = layer._polar([layer], matrices, sound_backend(weight), **_POLAR)
    matrices, bound = reference.contract(matrices)
    return matrices.view(weight.shape), bound


def _zero(layers: Sequence[Any], rows: Tensor) -> Tensor:
    """Zeros that depend on q, which cancels: its gradient is 0 and not None, as in the source."""
    return 0 * stacked([layer.q for layer in layers]).flatten(1).to(rows.dtype)
