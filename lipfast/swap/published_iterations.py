"""CPL and SOC with the power iterations of their published code, and what proves their bounds."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from lipfast import ops, reference
from lipfast.nn import CPLConv2d, SOCConv2d
from lipfast.nn.base import SoundWeights
from lipfast.nn.kernel import as_kernel, stacked, write_buffers
from lipfast.nn.residual import ResidualModule
from lipfast.ops.context import inside_transforms, is_traced

from .published_layers import FoldedResidual

_TRAINING_EPSILON = 1e-6
_EVAL_EPSILON = 1e-12


class PublishedCPLConv2d(FoldedResidual, CPLConv2d):
    """CPL with t = 2 / (s^2 + 1e-6), s the published estimate of the norm.

    One step of the power iteration in training and `eval_steps` in evaluation mode, both from the
    buffer `u`, which a layer without one draws at the size of its first map. s is a lower bound of
    the norm, so that the layer's own bound in evaluation mode is max(1, t norm^2 - 1) with a proved
    norm: above 1 where s has not converged.
    """

    def __init__(self, *args: Any, eval_steps: int = 100, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_steps = eval_steps

    def _make_parameters(self, bias: bool, factory: dict[str, Any]) -> None:
        ResidualModule._make_parameters(self, bias, factory)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        weights = [layer._own_weights(map_size) for layer in layers]
        return tuple(stacked(tensors) for tensors in zip(*weights, strict=True))

    def _own_weights(self, map_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        kernel = as_kernel(self.weight)
        start = self._start_vector(map_size)
        u, v = _power_iteration(kernel.detach(), start.to(kernel.dtype), 1, _TRAINING_EPSILON)
        if not inside_transforms():
            write_buffers([start], [u])
        return kernel, self._own_bias(kernel), _rescaling(kernel, u, v)

    def _own_bias(self, kernel: Tensor) -> Tensor:
        return kernel.new_zeros(len(kernel)) if self.bias is None else self.bias.to(kernel.dtype)

    def _start_vector(self, map_size: tuple[int, int]) -> Tensor:
        if "u" not in self._buffers:
            size = self._last_map_size or map_size
            shape, weight = (1, self.weight.shape[0], *size), self.weight
            vector = torch.randn(shape, device=weight.device, dtype=weight.dtype)
            self.register_buffer("u", vector)
        return self._buffers["u"]  # type: ignore[return-value]

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        kernel, dtype = as_kernel(self.weight).detach(), self.weight.dtype
        start = self._start_vector(map_size).to(kernel.dtype)
        u, v = _power_iteration(kernel, start, self.eval_steps, _EVAL_EPSILON)
        t = _rescaling(kernel, u, v).to(dtype)
        kernel = kernel.to(dtype)
        norm = ops.conv_norm_map_bound(kernel, map_size, self.padding_mode)
        bound = (t.double() * norm**2 - 1).clamp_min(1)
        return SoundWeights((kernel, self._own_bias(kernel).detach(), t), bound)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        vector = state_dict.get(f"{prefix}u")
        if isinstance(vector, Tensor) and "u" not in self._buffers:
            self.register_buffer("u", self.weight.new_empty(vector.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def _power_iteration(
    kernel: Tensor, u: Tensor, steps: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    padding = (kernel.shape[-2] // 2, kernel.shape[-1] // 2)
    v = u
    for _ in range(steps):
        v = F.conv2d(u, kernel, padding=padding)
        v = v / (v.norm() + epsilon)
        u = F.conv_transpose2d(v, kernel, padding=padding)
        u = u / (u.norm() + epsilon)
    return u, v


def _rescaling(kernel: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """2 / (<W u, v>^2 + 1e-6); the product is linear in the kernel, so its gradient gives it."""
    padding = (kernel.shape[-2] // 2, kernel.shape[-1] // 2)
    with torch.no_grad():
        gradient = conv2d_weight(u, kernel.shape, v, padding=padding)
    return 2 / ((kernel * gradient).sum() ** 2 + _TRAINING_EPSILON)


class PublishedSOCConv2d(SOCConv2d):
    """SOC by Taylor's series, scaled by the smallest of four estimated norms, as published.

    Keeps the vectors u1, v1, ... u4, v4 of the power iterations on the kernel's unfoldings, which
    run `update_iters` steps in every forward pass in training, and `init_iters` in every
    `update_freq`-th, counted by `total_iters`; the counter stands still inside `torch.compile`. The
    estimates are lower bounds, and 5 terms of exp are no contraction: the layer's own bound in
    evaluation mode is the supremum of the polynomial for the proved norm of what it stores.
    """

    correction: Tensor
    total_iters: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, series="taylor", norm="unfolding", **kwargs)

    def _contracting(self, terms: int) -> reference.Coefficients:
        return reference.taylor_coefficients(terms)

    def _stacked_weights(
        self, layers: Sequence[Any], map_size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        return (stacked([layer._own_kernel() for layer in layers]),)

    def _own_kernel(self) -> Tensor:
        kernel = reference.skew_kernel(as_kernel(self.weight))
        pairs = [(pair[0].to(kernel.dtype), pair[1].to(kernel.dtype)) for pair in self._vectors()]
        steps = self._next_steps()
        unfoldings = _unfoldings(kernel)
        with torch.no_grad():
            pairs = [
                _iterate(matrix, u.flatten(), v.flatten(), steps)
                for matrix, (u, v) in zip(_unfoldings(kernel.detach()), pairs, strict=True)
            ]
            if not inside_transforms():
                own = [vector for pair in self._vectors() for vector in pair]
                new = [vector for pair in pairs for vector in pair]
                write_buffers(own, [a.view_as(b) for a, b in zip(new, own, strict=True)])
        return self._scaled(kernel, unfoldings, pairs)

    def _vectors(self) -> list[tuple[Tensor, Tensor]]:
        return [(getattr(self, f"u{i}"), getattr(self, f"v{i}")) for i in range(1, 5)]

    def _next_steps(self) -> int:
        """Of the power iterations in this forward pass."""
        own: Any = self
        if torch.compiler.is_compiling():
            return int(own.update_iters)
        self.total_iters += 1
        due = (self.total_iters - 1) % own.update_freq == 0
        return int(own.init_iters if due else own.update_iters)

    def _scaled(
        self, kernel: Tensor, unfoldings: list[Tensor], pairs: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        products = [v @ (m @ u) for m, (u, v) in zip(unfoldings, pairs, strict=True)]
        norm = torch.stack(products).amin()
        inverse = torch.where(norm == 0, 0, 1 / torch.where(norm == 0, 1, norm))
        return kernel * (self.correction.to(kernel.dtype) * inverse)

    def _sound_weights(self, map_size: tuple[int, int]) -> SoundWeights:
        dtype = self.weight.dtype
        kernel = reference.skew_kernel(as_kernel(self.weight))
        pairs = [
            (u.to(kernel.dtype).flatten(), v.to(kernel.dtype).flatten()) for u, v in self._vectors()
        ]
        kernel = self._scaled(kernel, _unfoldings(kernel), pairs).to(dtype).double()
        _, bound = reference.skew_norm_bound(kernel, self._side)
        proved = self._supremum(bound)
        if self.kernel_size != (1, 1):
            return SoundWeights((kernel.to(dtype),), proved)
        matrix = reference.matrix_polynomial(kernel[:, :, 0, 0], self._eval_coefficients)
        matrix = matrix[: self.out_channels, : self._inner_channels, None, None]
        size = sum(a * bound**k for k, a in enumerate(self._eval_coefficients))
        c = len(kernel)
        rounding = self.eval_terms * c * (c + 2) * torch.finfo(torch.float64).eps * size
        stored, proved = reference.round_contraction(matrix, proved + rounding, dtype)
        return SoundWeights((stored,), proved)

    def _supremum(self, norm: Tensor) -> Tensor:
        """Of norm(p(L)) over all L of that norm; Inf while there are no values to look at."""
        value = math.inf
        if not is_traced(norm) and math.isfinite(limit := float(norm)):
            value = reference.taylor_supremum(self.eval_terms, limit)
        return torch.full_like(norm, value)


def _unfoldings(kernel: Tensor) -> list[Tensor]:
    """The kernel as matrices (v, u): tall and wide in rows, in columns, and in both at once."""
    c, _, kh, kw = kernel.shape
    return [
        kernel.permute(0, 2, 1, 3).reshape(c * kh, c * kw),
        kernel.permute(0, 3, 1, 2).reshape(c * kw, c * kh),
        kernel.reshape(c, c * kh * kw),
        kernel.permute(1, 0, 2, 3).reshape(c, c * kh * kw),
    ]


def _iterate(matrix: Tensor, u: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    for _ in range(steps):
        v = F.normalize(matrix @ u, dim=0)
        u = F.normalize(matrix.T @ v, dim=0)
    return u, v
