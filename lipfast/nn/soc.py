"""SOC: skew orthogonal convolutions (Singla and Feizi, ICML 2021)."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lipfast import ops, reference
from lipfast.ops.context import inside_transforms

from .base import LipschitzModule, SoundWeights
from .kernel import (
    as_kernel,
    kept_channels,
    plain_kernel,
    stacked,
    stacked_kernels,
    write_buffers,
)
from .layers import LipschitzConv2d, LipschitzLinear, positive_int
from .residual import match_channels

_CORRECTION = 0.7  # share of the unfoldings' norm that kernels larger than 1x1 are scaled to
_SPECTRAL_LIMIT = 2.1  # radians: where the series for norm="spectral" ends
_MARGIN = 1.02  # room in training for an estimate below the norm
_FIRST_STEPS = 10  # of the power iteration, for fresh weights


class _SOC(LipschitzModule):
    power_vector: Tensor

    def __init__(  # type: ignore[no-untyped-def]
        self,
        *args,
        series: str = "unimodular",
        terms: int = 5,
        eval_terms: int | None = None,
        norm: str = "spectral",
        save: str = "terms",
        **kwargs,
    ) -> None:
        name = type(self).__name__
        self.series = _one_of("series", series, ("unimodular", "taylor"), name)
        self.norm = _one_of("norm", norm, ("spectral", "unfolding"), name)
        self.save = _one_of("save", save, ("terms", "input"), name)
        self.terms = positive_int("terms", terms, name)
        if eval_terms is None:
            eval_terms = 12 if series == "taylor" else terms
        self.eval_terms = positive_int("eval_terms", eval_terms, name)
        super().__init__(*args, **kwargs)
        self._coefficients = self._contracting(self.terms)
        self._eval_coefficients = self._contracting(self.eval_terms)

    def _contracting(self, terms: int) -> reference.Coefficients:
        """The series, at most 1 in absolute value on i [-limit, limit]."""
        if self.series == "unimodular":
            return reference.unimodular_coefficients(terms, self._norm_limit)
        return reference.contracting(reference.taylor_coefficients(terms), self._norm_limit)

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        c = max(self._inner_channels, self.out_channels)
        shape = (c, c) if self._linear else (c, c, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self._register_bias(self.out_channels if bias else None, factory)
        if self.norm == "spectral":
            frequencies = self._side * (self._side // 2 + 1)
            self.register_buffer("power_vector", torch.empty(2, frequencies, c, **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weight from N(0, 1 / c), bias from U(-1 / sqrt(out), 1 / sqrt(out))."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[0]))
        if self.bias is not None:
            limit = 1 / math.sqrt(self.out_channels)
            nn.init.uniform_(self.bias, -limit, limit)
        if self.norm == "spectral":
            self.reset_power_vector()

    @torch.no_grad()
    def reset_power_vector(self) -> None:
        """Start the power iteration again from fixed vectors, close to the norm of the weight."""
        kernel = self._unit_skew_kernel(self.weight)
        vector = torch.arange(self.power_vector.numel(), device=kernel.device)
        vector = vector.to(kernel.dtype).cos().reshape(self.power_vector.shape)
        vector = vector / vector.norm(dim=(0, 2), keepdim=True)
        for _ in range(_FIRST_STEPS):
            _, vector = reference.skew_power_iteration(kernel, vector, self._side)
        self.power_vector.copy_(vector)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        name = prefix + "power_vector"
        if name not in missing_keys or prefix + "weight" not in state_dict:
            return
        if self.weight.device != self.power_vector.device:  # a layer from meta got its weight
            self.power_vector = torch.empty_like(self.power_vector, device=self.weight.device)
        self.reset_power_vector()
        missing_keys.remove(name)

    @property
    def _side(self) -> int:
        """Of the torus on which the norm is estimated: fine enough for the kernel's frequencies."""
        return max(1, 8 * (self.kernel_size[0] - 1))

    @property
    def _norm_limit(self) -> float:
        """What the norm of L is scaled to be at most, with room for rounding."""
        if self.norm == "spectral":
            return _SPECTRAL_LIMIT
        taps = self.kernel_size[0] * self.kernel_size[1]
        return (1.0 if taps == 1 else _CORRECTION * math.sqrt(taps)) * (1 + 1e-6)

    def _unit_skew_kernel(self, weight: Tensor) -> Tensor:
        """The kernel of a weight, or those of several in (layers, ...), with largest tap 1."""
        taps = (-4, -3, -2, -1)
        kernel, _ = reference.unit_scale(as_kernel(weight), dim=taps)
        return reference.unit_scale(reference.skew_kernel(kernel), dim=taps)[0]

    def _build_options(self) -> tuple[Hashable, ...]:
        return (*super()._build_options(), self.series, self.terms, self.norm)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        kernels = self._unit_skew_kernel(stacked_kernels(layers))
        if self.norm == "unfolding":
            return (self._scaled_by_unfoldings(kernels, squarings=5)[0],)
        buffers = [layer.power_vector for layer in layers]
        start = stacked(buffers).to(kernels.dtype)
        norms, vectors = reference.skew_power_iteration(kernels, start, self._side)
        if not inside_transforms():
            write_buffers(buffers, vectors.unbind())
        factors = self._norm_limit / _MARGIN * reference.inverse_or_zero(norms)
        return (kernels * factors.view(-1, 1, 1, 1, 1),)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernel = self._unit_skew_kernel(self.weight.double())
        if self.norm == "unfolding":
            kernel, bound = self._scaled_by_unfoldings(kernel, squarings=22)
        else:
            norm, bound = reference.skew_norm_bound(kernel, self._side)
            # the scale of training, unless the bound is so loose that it would leave the limit
            divisor = torch.maximum(_MARGIN * norm, bound * (1 + 1e-12))
            scale = self._norm_limit * reference.inverse_or_zero(divisor)
            kernel, bound = kernel * scale, bound * scale
        # within the limit p(L) is a contraction
        proved = torch.where(bound <= self._norm_limit, 1.0, math.inf)
        dtype = self.weight.dtype
        if self.kernel_size == (1, 1):
            matrix = reference.matrix_polynomial(kernel[:, :, 0, 0], self._eval_coefficients)
            matrix = matrix[: self.out_channels, : self._inner_channels, None, None]
            stored, proved = reference.round_contraction(matrix, proved + self._rounding(), dtype)
            return SoundWeights((stored,), proved)
        # both casts keep it skew; see round_contraction for how the second bound follows
        stored, stored_bound = reference.round_contraction(kernel, bound, dtype)
        return SoundWeights(
            (stored,), torch.where(stored_bound <= self._norm_limit, proved, math.inf)
        )

    def _rounding(self) -> float:
        """Of p(L) for a 1x1 kernel: each product adds c (c + 2) eps / 2 of its factors' norms."""
        c = self.weight.shape[0]
        size = sum(abs(a) * self._norm_limit**k for k, a in enumerate(self._eval_coefficients))
        return self.eval_terms * c * (c + 2) * torch.finfo(torch.float64).eps * size

    def _scaled_by_unfoldings(self, kernel: Tensor, *, squarings: int) -> tuple[Tensor, Tensor]:
        norm = reference.unfolding_bound(kernel, skew=True, squarings=squarings)
        scale = self._norm_limit / (1 + 1e-6) * reference.inverse_or_zero(norm)
        return kernel * scale[..., None, None, None, None], norm * scale

    def _run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        (kernel,) = weights
        if self.kernel_size == (1, 1) and not self.training:  # p(L) itself
            y = reference.conv2d_same(x, kernel, None, "zeros")
        else:
            coefficients = self._coefficients if self.training else self._eval_coefficients
            x = match_channels(x, kernel.shape[0])
            y = ops.skew_exp(x, kernel, coefficients, self.padding_mode, save=self.save)
            y = y[:, : self.out_channels]
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def effective_kernel(self, input_size: tuple[int, int] | None = None) -> Tensor:
        """Return the matrix p(L) of a 1x1 kernel, (out, in, 1, 1) or (out, in); else raise.

        With stride s it acts on `torch.nn.PixelUnshuffle(s)` of the input, in = s^2 in_channels.
        """
        if self.kernel_size != (1, 1):
            return super().effective_kernel(input_size)
        (kernel,) = self._sound(self._map_size(input_size)).weights
        return (kernel.flatten(1) if self._linear else kernel).clone()

    def _plain(
        self,
        weights: tuple[Tensor, ...],
        map_size: tuple[int, int],
        channels: tuple[int, int] | None = None,
    ) -> nn.Module:
        if self.kernel_size == (1, 1):
            return plain_kernel(self, *kept_channels(weights[0], self.bias, channels))
        kept = channels or (self._inner_channels, self.out_channels)
        return fx.symbolic_trace(_PlainSkewExp(self, weights[0], kept))

    def extra_repr(self) -> str:
        names = ("series", "terms", "eval_terms", "norm", "save")
        return ", ".join(
            [super().extra_repr(), *(f"{name}={getattr(self, name)!r}" for name in names)]
        )


class SOCConv2d(_SOC, LipschitzConv2d):
    """Orthogonal convolution p(L), L = M - M^T a skew-symmetric convolution, p nearly exp.

    By default p is the near-orthogonal polynomial of degree 5 for norm(L) <= 2.1, whose singular
    values lie between 0.99998 and 1, and L is scaled to that norm over 1.02. In training the norm
    is estimated by one step of a power iteration for each frequency of a torus, with the vectors in
    a buffer: the layer is 1-Lipschitz there once the estimate has come within 1 to 2 %. State dicts
    without that buffer are loaded too, and the iteration starts again from the loaded weight. In
    evaluation the norm is computed in float64, and a bound for every map size and padding shows
    that norm(L) <= 2.1.

    The layer as published (Singla and Feizi 2021, equation 8 and theorem 1) is
    `series="taylor", norm="unfolding"`: 5 and 12 terms of exp, with L scaled by 0.7 (1 for 1x1
    kernels) over the smallest norm of the kernel's unfoldings, so that norm(L) <= 0.7 k; 5 terms
    are divided by 1.0047, what they may expand by.

    c = max(in_channels, out_channels): missing input channels are zero, and the first out_channels
    of the result are kept. Zero and circular padding, every map size.

    Args:
        series: "unimodular", see `lipfast.reference.unimodular_coefficients`, or "taylor".
        terms: degree of the polynomial in training mode.
        eval_terms: degree in evaluation mode; None for 12 of a Taylor series, else for `terms`.
        norm: "spectral" scales L by its norm, "unfolding" by the published upper bound of it.
        save: "terms" keeps `terms` maps for the backward pass, "input" one: see
            `lipfast.ops.skew_exp`.

    See `LipschitzConv2d` for the other arguments.
    """


class SOCLinear(_SOC, LipschitzLinear):
    """Linear layer with the matrix p(L), nearly orthogonal, L skew-symmetric.

    See `SOCConv2d` for the polynomial, the norm of L (at most 1 for norm="unfolding"), the
    arguments `series` to `save`, and in_features != out_features, `LipschitzLinear` for the other
    arguments.
    """


class _PlainSkewExp(nn.Module):
    """Traced into a chain of one convolution."""

    bias: Tensor

    def __init__(self, module: _SOC, kernel: Tensor, channels: tuple[int, int]) -> None:
        super().__init__()
        inputs, self.outputs = channels
        self.conv = plain_kernel(module, kernel, None)
        self.extra = kernel.shape[0] - inputs
        self.cropped = self.outputs < kernel.shape[0]
        self.coefficients = module._eval_coefficients
        bias = kernel.new_zeros(1) if module.bias is None else module.bias[: self.outputs].detach()
        self.register_buffer("bias", bias[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.extra:
            x = F.pad(x, (0, 0, 0, 0, 0, self.extra))
        z = x
        for k in range(len(self.coefficients) - 1, 0, -1):
            z = x + self.conv(z) * (self.coefficients[k] / self.coefficients[k - 1])
        if self.cropped:
            z = z.narrow(-3, 0, self.outputs)
        return self.coefficients[0] * z + self.bias


def _one_of(argument: str, value: str, choices: tuple[str, ...], name: str) -> str:
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{argument}: {name} expected {expected}, got {value!r}")
    return value
