"""SOC: skew orthogonal convolutions (Singla and Feizi, ICML 2021)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lipfast import reference

from .base import LipschitzModule, SoundWeights
from .kernel import as_kernel, plain_kernel
from .layers import LipschitzConv2d, LipschitzLinear, positive_int
from .residual import match_channels

_CORRECTION = 0.7  # share of the unfoldings' norm that kernels larger than 1x1 are scaled to


class _SOC(LipschitzModule):
    terms: int
    eval_terms: int

    def __init__(self, *args, terms: int = 5, eval_terms: int = 12, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*args, **kwargs)
        self.terms = positive_int("terms", terms, type(self).__name__)
        self.eval_terms = positive_int("eval_terms", eval_terms, type(self).__name__)
        limit = self._norm_limit
        self._supremum = reference.taylor_supremum(self.terms, limit)
        self._eval_supremum = reference.taylor_supremum(self.eval_terms, limit)

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        c = max(self.in_channels, self.out_channels)
        shape = (c, c) if self._linear else (c, c, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self._register_bias(self.out_channels if bias else None, factory)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weight from N(0, 1 / c), bias from U(-1 / sqrt(out), 1 / sqrt(out))."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[0]))
        if self.bias is not None:
            limit = 1 / math.sqrt(self.out_channels)
            nn.init.uniform_(self.bias, -limit, limit)

    @property
    def _norm_limit(self) -> float:
        """What the norm of L is scaled to be at most, with room for rounding."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        return (1.0 if taps == 1 else _CORRECTION * math.sqrt(taps)) * (1 + 1e-6)

    def _skew_kernel(self, weight: Tensor) -> Tensor:
        kernel = reference.skew_kernel(reference.unit_scale(as_kernel(weight))[0])
        kernel, _ = reference.unit_scale(kernel)
        norm = reference.unfolding_bound(kernel, skew=True)
        return kernel * (self._norm_limit / (1 + 1e-6) * reference.inverse_or_zero(norm))

    def _training_weights(self, map_size: tuple[int, int]) -> tuple[Tensor, ...]:
        return (self._skew_kernel(self.weight),)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernel = self._skew_kernel(self.weight.double())
        # the cast moves each unfolding by at most this Frobenius norm
        movement = kernel.norm() * (torch.finfo(self.weight.dtype).eps / 2)
        movement = movement * math.sqrt(self.kernel_size[0] * self.kernel_size[1])
        kernel = (kernel / (1 + movement / self._norm_limit)).to(self.weight.dtype)
        norm = reference.unfolding_bound(kernel.double(), skew=True)
        # within the limit p(L) / sup |p| is a contraction; beyond it |p(i t)| <= exp(t)
        bound = torch.where(norm <= self._norm_limit, torch.ones_like(norm), norm.exp())
        return SoundWeights((kernel,), bound)

    def _run(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        (kernel,) = weights
        terms = self.terms if self.training else self.eval_terms
        supremum = self._supremum if self.training else self._eval_supremum
        x = match_channels(x, kernel.shape[0])
        y = reference.skew_exp(x, kernel, terms, self.padding_mode)[:, : self.out_channels]
        if supremum > 1:
            y = y / supremum
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def effective_kernel(self, input_size: tuple[int, int] | None = None) -> Tensor:
        """Return the matrix p(L) of a 1x1 kernel, (out, in, 1, 1) or (out, in); else raise."""
        if self.kernel_size != (1, 1):
            return super().effective_kernel(input_size)
        kernel = self._matrix_kernel(self._sound(self._map_size(input_size)).weights[0])
        return kernel.flatten(1) if self._linear else kernel

    def _matrix_kernel(self, kernel: Tensor) -> Tensor:
        c = kernel.shape[0]
        columns = torch.eye(c, dtype=torch.float64, device=kernel.device)[:, :, None, None]
        matrix = reference.skew_exp(columns, kernel.double(), self.eval_terms, "zeros")[..., 0, 0].T
        matrix = matrix / self._eval_supremum
        matrix = matrix[: self.out_channels, : self.in_channels]
        return matrix.to(kernel.dtype)[:, :, None, None]

    def _plain(self, weights: tuple[Tensor, ...], map_size: tuple[int, int]) -> nn.Module:
        if self.kernel_size == (1, 1):
            return plain_kernel(self, self._matrix_kernel(weights[0]), self.bias)
        return fx.symbolic_trace(_PlainSkewExp(self, weights[0]))


class SOCConv2d(_SOC, LipschitzConv2d):
    """Orthogonal convolution exp(L), L = M - M^T a skew-symmetric convolution.

    The Taylor polynomial of exp (Singla and Feizi 2021, equation 8) with L scaled by 0.7 (1 for
    1x1 kernels) over the smallest norm of the kernel's unfoldings (theorem 1), so that
    norm(L) <= 0.7 k. The unfoldings' norms are upper bounds by Gram iteration, and the polynomial
    is divided by its largest absolute value on that interval of the imaginary axis, so that the
    layer is 1-Lipschitz in training and evaluation. c = max(in_channels, out_channels): missing
    input channels are zero, and the first out_channels of the result are kept. Zero and circular
    padding, every map size. The interval of 5x5 kernels, [0, 3.5], is wide for 5 terms, whose
    supremum there is 1.34; 8 terms reach 1.02.

    Args:
        terms: degree of the Taylor polynomial in training mode.
        eval_terms: degree of the Taylor polynomial in evaluation mode.

    See `LipschitzConv2d` for the other arguments.
    """


class SOCLinear(_SOC, LipschitzLinear):
    """Linear layer with the orthogonal matrix exp(L), L skew-symmetric of norm at most 1.

    See `SOCConv2d` for the polynomial and for in_features != out_features.

    Args:
        terms: degree of the Taylor polynomial in training mode.
        eval_terms: degree of the Taylor polynomial in evaluation mode.

    See `LipschitzLinear` for the other arguments.
    """


class _PlainSkewExp(nn.Module):
    """Traced into a chain of one convolution."""

    bias: Tensor

    def __init__(self, module: _SOC, kernel: Tensor) -> None:
        super().__init__()
        self.conv = plain_kernel(module, kernel, None)
        self.terms, self.outputs = module.eval_terms, module.out_channels
        self.extra = kernel.shape[0] - module.in_channels
        self.supremum = module._eval_supremum
        bias = kernel.new_zeros(1) if module.bias is None else module.bias.detach()
        self.register_buffer("bias", bias[:, None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.extra:
            x = F.pad(x, (0, 0, 0, 0, 0, self.extra))
        term, total = x, x
        for i in range(1, self.terms + 1):
            term = self.conv(term) / i
            total = total + term
        return total[..., : self.outputs, :, :] / self.supremum + self.bias
