"""The residual 1-Lipschitz layers x - W^T (t * relu(W x + b)): CPL and SLL."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lipfast import ops, reference

from .base import LipschitzModule, SoundWeights
from .cayley import initialise_uniform_bias
from .kernel import (
    as_kernel,
    assert_map_size,
    gram_backend,
    plain_kernel,
    stacked,
    stacked_kernels,
    write_buffers,
)
from .layers import LipschitzConv2d, LipschitzLinear

_MAP_LIMIT = 32  # side of the largest patch on which CPL estimates the norm in training
_FREQUENCY_LIMIT = 64  # channels up to which the tighter bound for all maps costs little
_Q_EPSILON = 1e-6
_Q_MINIMUM = 1e-12  # smallest ratio of two q: any positive q gives a bound, this one no overflow


class ResidualModule(LipschitzModule):
    """A residual layer on c = max(in_channels, out_channels) channels, its hidden width too.

    Missing input channels are zero, and the first out_channels of the result are kept. The weights
    are the kernel, the bias and the scale t, jointly rescaled so that the largest tap, of the
    kernel (CPL) or of each row (SLL), is 1: the layer does not change, and squares of tiny or huge
    weights stay finite.
    """

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        c = max(self._inner_channels, self.out_channels)
        shape = (c, c) if self._linear else (c, c, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self._register_bias(c if bias else None, factory)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier normal weight, uniform bias."""
        nn.init.xavier_normal_(self.weight)
        initialise_uniform_bias(self)

    def _scaled_bias(self, layers: Sequence[Any], scale: Tensor) -> Tensor:
        """The biases (layers, c) divided by scale, (layers, c) or (layers, 1)."""
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if not biases:
            return scale.new_zeros(len(layers), self.weight.shape[0])
        limit = torch.finfo(self.weight.dtype).max  # any bias makes a contraction, Inf makes NaN
        return (stacked(biases).to(scale.dtype) / scale).clamp(-limit, limit)

    def _run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        kernel, bias, scale = weights
        x = match_channels(x, kernel.shape[1])
        y = ops.residual_conv(x, kernel, bias, scale, self.padding_mode)
        return y[:, : self.out_channels]

    def _plain(
        self,
        weights: tuple[Tensor, ...],
        map_size: tuple[int, int],
        channels: tuple[int, int] | None = None,
    ) -> nn.Module:
        only = map_size if self._depends_on_map_size else None
        kept = channels or (self._inner_channels, self.out_channels)
        return fx.symbolic_trace(_PlainResidual(self, only, kept, *weights))


class _CPL(ResidualModule):
    power_vector: Tensor

    def __init__(self, *args: Any, norm: str = "estimate", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if norm not in ("estimate", "sound"):
            name = type(self).__name__
            raise ValueError(f"norm: {name} expected 'estimate' or 'sound', got {norm!r}")
        self.norm = norm

    @property
    def _depends_on_map_size(self) -> bool:  # type: ignore[override]
        return self.norm == "estimate" and self.kernel_size != (1, 1)

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        super()._make_parameters(bias, factory)
        side = 1 if self.kernel_size == (1, 1) else _MAP_LIMIT
        vector = torch.empty(1, self.weight.shape[1], side, side, **factory)
        self.register_buffer("power_vector", vector)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier normal weight, uniform bias, normal start vector of the power iteration."""
        super().reset_parameters()
        nn.init.normal_(self.power_vector)

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.norm)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        kernels, scale = reference.unit_scale(stacked_kernels(layers), dim=(1, 2, 3, 4))
        if self.norm == "sound":
            norms = self._any_map(kernels)
        else:
            norms = self._estimate(layers, kernels, map_size)
        t = 2 * reference.inverse_or_zero(norms**2)
        return kernels, self._scaled_bias(layers, scale.view(-1, 1)), t

    def _estimate(
        self, layers: Sequence[Any], kernels: Tensor, map_size: tuple[int, int]
    ) -> Tensor:
        h, w = map_size
        patches = [layer.power_vector[..., :h, :w] for layer in layers]
        start = torch.cat(patches).to(kernels.dtype)
        norms, vectors = ops.conv_norm(kernels, start, self.padding_mode)
        if gram_backend() is None:  # inside torch.func transforms nothing may be written
            write_buffers(patches, vectors.split(1))
        return norms

    def _any_map(self, kernel: Tensor) -> Tensor:
        """An upper bound for every map, a fifth above the norm, or up to two thirds if wide."""
        narrow = kernel.shape[-3] <= _FREQUENCY_LIMIT
        return ops.conv_norm_bound(kernel, method="frequency" if narrow else "unfolding")

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernel, scale = reference.unit_scale(as_kernel(self.weight).double())
        dtype = self.weight.dtype
        kernel = kernel.to(dtype)
        if self.norm == "sound":
            # Gram iteration is off by fewer roundings than entries in a filter, squared
            rounding = 8 * kernel[0].numel() ** 2 * torch.finfo(torch.float64).eps
            norm = self._any_map(kernel.double()) * (1 + rounding)
        else:
            norm = ops.conv_norm_map_bound(kernel, map_size, self.padding_mode)
        t = 2 * reference.inverse_or_zero(norm**2)
        t = _round_down(t, dtype)
        bound = (t.double() * norm**2 - 1).clamp_min(1)
        bias = self._scaled_bias([self], scale.view(1, 1))[0]
        return SoundWeights((kernel, bias.to(dtype), t), bound)


class _SLL(ResidualModule):
    q: nn.Parameter

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        super()._make_parameters(bias, factory)
        self.q = nn.Parameter(torch.empty(self.weight.shape[0], **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier normal weight, uniform bias, standard normal q."""
        super().reset_parameters()
        nn.init.normal_(self.q)

    def _row_sums(
        self,
        layers: Sequence[Any],
        kernels: Tensor,
        scale: Tensor,
        backend: str | None,
    ) -> Tensor:
        """Row sums (layers, c) of kernels that were divided by scale (layers, c)."""
        scale = scale * kernels.detach().abs().amax(dim=(2, 3, 4))  # the largest tap: 1, or 0
        q = stacked([layer.q for layer in layers]).to(kernels.dtype)
        q = (q.abs() + _Q_EPSILON) * reference.unit_scale(scale, dim=(1,))[0]
        q = reference.unit_scale(q, dim=(1,))[0].clamp_min(_Q_MINIMUM)
        return ops.gram_bound(kernels, q, axis="out", backend=backend)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        kernels, scale = reference.unit_scale(stacked_kernels(layers), dim=(2, 3, 4))
        scale = scale.flatten(1)
        rows = self._row_sums(layers, kernels, scale, gram_backend())
        t = 2 * reference.inverse_or_zero(rows)
        return kernels, self._scaled_bias(layers, scale), t

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernel, scale = reference.unit_scale(as_kernel(self.weight).double(), dim=(1, 2, 3))
        scale = scale.view(1, -1)
        dtype = self.weight.dtype
        kernel = kernel.to(dtype)
        rows = self._row_sums([self], kernel.double()[None], scale, "reference")[0]
        t = _round_down(2 * reference.inverse_or_zero(rows), dtype)
        bound = (t.double() * rows - 1).amax().clamp_min(1)
        bias = self._scaled_bias([self], scale)[0]
        return SoundWeights((kernel, bias.to(dtype), t), bound)


class CPLConv2d(_CPL, LipschitzConv2d):
    """Convex potential layer x - (2 / norm_2(W)^2) W^T relu(W x + b) (Meunier et al. 2022).

    In training the norm is estimated by one step of `lipfast.ops.conv_norm` from a vector that is a
    buffer, on the input's map or its first 32 x 32 pixels: a lower bound, so that the layer is only
    about 1-Lipschitz there. Inside torch.func transforms the buffer is read and not written. In
    evaluation mode the norm is a proved upper bound for the map at hand, 1e-4 above it on maps that
    are not too large: see `lipfast.ops.conv_norm_map_bound`. Where out_channels > in_channels the
    input gets zero channels, where it is smaller the first out_channels are kept.

    Args:
        norm: "estimate" as above; "sound" is a bound for every map in training and evaluation,
            `lipfast.ops.conv_norm_bound` by frequencies up to 64 channels and by unfoldings beyond,
            and makes a weaker layer.

    See `LipschitzConv2d` for the other arguments.
    """


class CPLLinear(_CPL, LipschitzLinear):
    """Convex potential layer on vectors, x - (2 / norm_2(W)^2) W^T relu(W x + b).

    See `CPLConv2d` for the norm and for in_features != out_features, `LipschitzLinear` for the
    other arguments (Meunier et al. 2022, equation 8).
    """


class SLLConv2d(_SLL, LipschitzConv2d):
    """SDP-based layer x - 2 W^T T^(-1) relu(W x + b) (Araujo et al. 2023, theorem 3).

    T_ii = sum_j sum_delta |G_delta|_ij q_j / q_i with G the correlation of the output channels of
    W and q = abs(q) + 1e-6 learned: the same positive numbers on both sides, so that the bound
    holds for every q. Zero and circular padding, every map size. Where out_channels > in_channels
    the input gets zero channels, where it is smaller the first out_channels are kept. See
    `LipschitzConv2d` for the arguments.
    """


class SLLLinear(_SLL, LipschitzLinear):
    """SDP-based layer on vectors, x - 2 W^T T^(-1) relu(W x + b) (Araujo et al. 2023).

    See `SLLConv2d` for T and for in_features != out_features, `LipschitzLinear` for the arguments.
    """


class _PlainResidual(nn.Module):
    """Traced into two convolutions or matrices, ReLU and a sum; -t is folded into the second."""

    def __init__(
        self,
        module: LipschitzModule,
        map_size: tuple[int, int] | None,
        channels: tuple[int, int],
        kernel: Tensor,
        bias: Tensor,
        t: Tensor,
    ) -> None:
        super().__init__()
        self.map_size = map_size
        inputs, self.outputs = channels
        width = max(inputs, self.outputs)
        scaled = -kernel * (t if t.dim() == 0 else t[:, None, None, None])
        second = reference.transpose_kernel(scaled)
        self.first = plain_kernel(module, kernel[:, :inputs], bias)
        self.relu = nn.ReLU()
        self.second = plain_kernel(module, second[: self.outputs], None)
        self.dim = -1 if module._linear else -3
        missing = width - inputs
        self.padding = (*(0,) * (-2 * self.dim - 1), missing) if missing else None
        self.cropped = width > self.outputs

    def forward(self, x: Tensor) -> Tensor:
        if self.map_size is not None:  # t is that of these maps
            assert_map_size(x, self.map_size)
        y = self.second(self.relu(self.first(x)))
        if self.padding is not None:
            x = F.pad(x, self.padding)
        if self.cropped:
            x = x.narrow(self.dim, 0, self.outputs)
        return x + y


def match_channels(x: Tensor, channels: int) -> Tensor:
    """Append zero channels to x (n, c, h, w) up to `channels`."""
    missing = channels - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing > 0 else x


def _round_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a non-negative float64 tensor so that no entry grows."""
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps
    return (value * (1 - finfo.eps) - smallest).clamp_min(0).to(dtype)
