"""The layers of orthogonium (Boissin et al., "An adaptive orthogonal convolution scheme", 2025)."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipfast import ops, reference
from lipfast.nn.base import SoundWeights
from lipfast.nn.bcop import BjorckLinear
from lipfast.nn.convergence import PolarModule
from lipfast.nn.kernel import as_kernel, sound_backend, stacked, stacked_kernels
from lipfast.ops.context import inside_transforms, is_traced

from .peers import PatchConv2d, PeerConv2d, PeerLinear, class_name, original, sound_windows, stored

_POWER_STEPS = 10  # for a checkpoint
# the derivative of the schedule itself: the source starts from random matrices, whose singular
# values differ by a factor of 6 and more
_POLAR = {"form": "bjorck", "schedule": "5355nn", "derivative": "jvp"}


class _PowerVectors(nn.Module):
    """Keeps the vectors of the source's power iterations, which nothing here needs, in checkpoints.

    In evaluation mode the source starts from them without iterating far: it would give NaN for
    vectors from before the training.
    """

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not is_traced(original(self, next(iter(self.parametrizations)))):  # type: ignore[arg-type]
            self._iterate()
        super()._save_to_state_dict(*args, **kwargs)

    @torch.no_grad()
    def _iterate(self) -> None:
        entries: Any = self.parametrizations
        for name in entries:
            for module in entries[name].modules():
                if class_name(module) == "ParametrizedBatchedPowerIteration":
                    vectors = module.parametrizations
                    u, v = vectors.u.original, vectors.v.original
                    matrices = entries[name].original.reshape(*u.shape[:-1], -1)
                    for _ in range(_POWER_STEPS):
                        v.copy_(F.normalize(matrices.mT @ u, dim=-2))
                        u.copy_(F.normalize(matrices @ v, dim=-2))


class OrthogoniumLinear(_PowerVectors, PeerLinear, BjorckLinear):
    """Linear layer with the polar factor of its weight, whose vectors it keeps."""


class OrthogoniumBlockConv2d(_PowerVectors, PolarModule, PeerConv2d):
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


class OrthogoniumPatchConv2d(_PowerVectors, PolarModule, PatchConv2d):
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
        kernel, bound = _sound_factor(self, self.weight)
        return sound_windows(self, kernel * self.scale, bound * abs(self.scale), map_size)


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
        patch, bound = _sound_factor(self, self.patch_weight)
        return sound_windows(self, self._composed(block, patch), norm * bound, map_size)

    def _composed(self, block: Tensor, patch: Tensor) -> Tensor:
        """The kernel of the convolution with `block`, followed by that with `patch`."""
        margins = (self.stride[0] - 1, self.stride[1] - 1)
        kernel = F.conv2d(
            block.transpose(0, 1), patch.flip(2, 3), padding=margins, groups=self.groups
        )
        return kernel.transpose(0, 1).contiguous()


def block_kernels(
    factors: Tensor, in_channels: int, out_channels: int, backend: str | None
) -> Tensor:
    """Return kernels (n, out, in / groups, k, k) of orthonormal factors (n, groups, 2 k, c, c / 2).

    The transposed kernel is a row of right factors: (I - 2 P_1) (I - 2 P_0), then for each block
    its horizontal and its vertical pair, the order of `ops.block_conv` with the axes exchanged.
    """
    layers, groups, number, c, _ = factors.shape
    pairs = number // 2 - 1
    order = [index for pair in _block_order(pairs) for index in (2 + pairs + pair, 2 + pair)]
    # all at once, and not by slices, whose derivatives fill whole tensors
    ordered = factors.flatten(0, 1)[:, [0, 1, *order]]
    first, second, halves = ordered.split([1, 1, 2 * pairs], dim=1)
    first, second = first.squeeze(1), second.squeeze(1)
    rows = min(in_channels, out_channels) // groups
    factor = torch.eye(rows, c, dtype=factors.dtype, device=factors.device)
    factor = factor - 2 * second[:, :rows] @ second.mT
    factor = torch.baddbmm(factor, factor @ first, first.mT, alpha=-2)
    if pairs:
        kernels = ops.block_conv(factor, halves, backend=backend).transpose(3, 4)
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


def _sound_factor(layer: PolarModule, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel that is orthogonal as a matrix of windows, in float64, and a bound of its norm."""
    matrices = _windows(weight.double()[None], layer.groups)
    matrices = layer._polar([layer], matrices, sound_backend(weight), **_POLAR)
    matrices, bound = reference.contract(matrices)
    return matrices.view(weight.shape), bound
