"""Bjorck's iteration as deel-torchlip runs it: stopped early, with its derivative cut short."""

from typing import Any

import torch
from torch import Tensor

from lipfast.ops.context import is_traced, torch_gradients

_STEPS = 15
_DERIVED_STEPS = 4  # the later ones count as a factor 1.5
_GAIN = 1.5


def stopped_bjorck(matrix: Tensor, tolerance: float) -> Tensor:
    """Return the iterate of X <- 1.5 X - 0.5 X X^T X that is within `tolerance` of the one before.

    At most 15 steps. The derivative is that of the first four steps, times 1.5 for each further
    one, whose cubic term counts as a constant: deel-torchlip's. Reads whether to stop from the
    device after each step, as the source does.

    Args:
        matrix: (m, n), of norm about 1.
        tolerance: Frobenius norm of the last change.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return stopped_bjorck(matrix.mT, tolerance).mT
    wide = matrix.shape[1] >= 2 * matrix.shape[0]
    if wide and not is_traced(matrix):
        return _OnGram.apply(matrix, tolerance)
    return _on_matrix(matrix, tolerance)


def _on_matrix(matrix: Tensor, tolerance: float) -> Tensor:
    traced = is_traced(matrix)
    stopped = torch.zeros((), dtype=torch.bool, device=matrix.device)
    for step in range(_STEPS):
        gram = matrix @ matrix.mT
        if step < _DERIVED_STEPS:
            after = torch.addmm(matrix, gram, matrix, beta=_GAIN, alpha=-0.5)
        else:
            after = _GAIN * matrix - 0.5 * (gram @ matrix).detach()
        small = torch.linalg.vector_norm(after.detach() - matrix.detach()) < tolerance
        if traced:  # values are not known: the steps that the source leaves out change nothing
            matrix = torch.where(stopped, matrix, after)
            stopped = stopped | small
        else:
            matrix = after
            if bool(small):
                break
    return matrix


class _OnGram(torch.autograd.Function):
    """The same on m x m matrices: the iterates are P X with polynomials P of G = X X^T.

    With D = I - G, a step is P <- P + 1/2 D P, D <- 3/4 D^2 + 1/4 D^3, and moves the iterate by
    1/2 tr(D G D)^(1/2) in norm.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, tolerance: float) -> Tensor:
        identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        distance = identity - matrix @ matrix.mT
        factor, distances = identity, []
        for step in range(_STEPS):
            distances.append(distance)
            half = identity + 0.5 * distance
            factor = half if step == 0 else half @ factor
            square = distance @ distance
            change = (distance * (distance - square)).sum().clamp_min(0).sqrt() / 2
            if step + 1 == _STEPS or bool(change < tolerance):
                break
            distance = torch.addmm(square, square, distance, beta=0.75, alpha=0.25)
        ctx.tolerance, ctx.steps = tolerance, len(distances)
        ctx.save_for_backward(matrix, *distances[:_DERIVED_STEPS])
        return factor @ matrix

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        matrix, *distances = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():
            run = lambda x: _on_matrix(x, ctx.tolerance)  # noqa: E731
            return torch_gradients(run, (matrix,), grad)[0], None
        identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        halves = [identity + 0.5 * distance for distance in distances]
        factors = [identity]
        for half in halves:
            factors.append(half @ factors[-1])
        grad = grad * _GAIN ** (ctx.steps - len(distances))
        for_factor = grad @ matrix.mT
        for_gram = torch.zeros_like(identity)
        for half, distance, factor in zip(
            reversed(halves), reversed(distances), reversed(factors[:-1]), strict=True
        ):
            # G <- T G T and P <- T P with T = I + D / 2 = 3/2 I - G / 2
            inner = for_gram @ half
            cross = inner @ (identity - distance)
            for_half = for_factor @ factor + cross + cross.mT
            for_gram = half @ inner - 0.5 * for_half
            for_gram = 0.5 * (for_gram + for_gram.mT)
            for_factor = half @ for_factor
        result = factors[-1] @ grad
        return torch.addmm(result, for_gram, matrix, alpha=2.0), None
