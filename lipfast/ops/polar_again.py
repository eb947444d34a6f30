"""The derivative of the polar factor by operations that can be differentiated again."""

from typing import Any

import torch
from torch import Tensor

from lipfast.ops.context import torch_gradients
from lipfast.ops.polar_gemm import SHIFT, normalised
from lipfast.ops.polar_schedules import Step


def implicit(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Return dL/dx for grad = dL/dw, w the polar factor of x (B, P, m, n), m <= n.

    With H = (x w^H + w x^H) / 2 and C = grad w^H, dL/dx = S w + H^(-1) (grad - C w), where
    H S + S H = C - C^H. Derivation: docs/math/polar.md.
    """
    planar = x.shape[1] == 2
    grad, x, w = (torch.complex(*t.unbind(1)) if planar else t[:, 0] for t in (grad, x, w))
    m, n = x.shape[1:]
    # where w has not converged, as in the first derivative: H is positive definite whatever x is
    shift = torch.linalg.matrix_norm(x.detach(), keepdim=True) * (SHIFT / m**0.5)
    shift = torch.where(shift == 0, 1, shift)
    identity = torch.eye(m, dtype=x.dtype, device=x.device)
    polar = (x - shift * w) @ w.mH
    polar = (polar + polar.mH) / 2 + shift * identity
    inner = grad @ w.mH
    result = _Lyapunov.apply(polar, inner - inner.mH) @ w
    if m < n:
        result = result + torch.linalg.solve(polar, grad - inner @ w)
    return torch.stack([result.real, result.imag], dim=1) if planar else result[:, None]


class _Lyapunov(torch.autograd.Function):
    """The solution S of H S + S H = C, H Hermitian and positive definite."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, c: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(h)
        sums = values[:, :, None] + values[:, None]
        s = vectors @ ((vectors.mH @ c @ vectors) / sums) @ vectors.mH
        ctx.save_for_backward(h, s)
        return s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, s = ctx.saved_tensors
        t = _Lyapunov.apply(h, grad)
        return -(t @ s.mH + s.mH @ t), t


def unrolled(grad: Tensor, x: Tensor, schedule: tuple[Step, ...]) -> Tensor:
    """Return the derivative of the schedule's own map at x applied to grad."""
    _, _, _, norm, scale = normalised(x.detach().contiguous())
    planar = x.shape[1] == 2

    def steps(x: Tensor) -> Tensor:
        x = torch.complex(*x.unbind(1)) if planar else x[:, 0]
        x = x / (norm * scale)
        for a, b, c in schedule:
            gram = x @ x.mH
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return torch.stack([x.real, x.imag], dim=1) if planar else x[:, None]

    (result,) = torch_gradients(steps, (x,), grad)
    assert result is not None  # x requires a gradient: there was a backward pass
    return result
