"""Polar factors of batches of matrices, by minimax polynomials with an implicit derivative."""

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from lipfast import backends, reference
from lipfast.ops.polar_op import launcher, polar_op
from lipfast.ops.polar_schedules import SCHEDULES

_REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_COMPLEX = (torch.complex128, torch.complex64)
_FORMS = ("newton", "bjorck")
_DERIVATIVES = ("cg", "jvp")


@overload
def polar(
    matrix: Tensor,
    *,
    planar: bool = ...,
    ridge: float | Tensor = ...,
    schedule: str = ...,
    derivative: str = ...,
    steps: int | None = ...,
    form: str = ...,
    return_residual: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def polar(
    matrix: Tensor,
    *,
    planar: bool = ...,
    ridge: float | Tensor = ...,
    schedule: str = ...,
    derivative: str = ...,
    steps: int | None = ...,
    form: str = ...,
    return_residual: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def polar(
    matrix: Tensor,
    *,
    planar: bool = False,
    ridge: float | Tensor = 0.0,
    schedule: str = "535nn",
    derivative: str = "cg",
    steps: int | None = None,
    form: str = "newton",
    return_residual: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return W = (V V^H + ridge I)^(-1/2) V, the nearest matrix to V with orthonormal rows.

    For m > n the columns are orthonormal, W = V (V^H V + ridge I)^(-1/2). The singular values of W
    never exceed 1 but for rounding, 1e-6 in float32, whatever V is; they reach 1 where
    sigma_min(V) / nu is at least 0.2, 0.07, 0.02, 0.003, 0.0005 for the schedules in the order
    below, with nu = ||V V^H V V^H||_F^(1/4) or less, between the norm of V and m^(1/4) times it.
    A zero matrix gives zeros and a finite gradient, one with NaN or Inf gives NaN. The derivative
    can be differentiated again. Float32 products follow
    PyTorch's settings for TF32 and bfloat16, those of the last step excepted. Two calls give the
    same bits. Derivation and accuracy: docs/math/polar.md.

    Args:
        matrix: V, (..., m, n); float64, float32, complex128 or complex64, or bfloat16 and float16,
            which are computed in float32.
        planar: `matrix` and W are real, (..., 2, m, n), with the real and the imaginary part of
            complex matrices; the layout in which complex matrices are fastest.
        ridge: number, or tensor that broadcasts with the batch dimensions (...), >= 0; a constant
            for the derivative.
        schedule: "55n", "535nn", "5355nn", "55555nn" or "555555nn", minimax steps of degree 5 and 3
            and contracting steps, 8, 12, 15, 19 or 22 matrix products. The last two are for
            products in full float32. In float64, contracting steps are added.
        derivative: "cg" solves for the derivative of the polar factor itself, and is accurate where
            W has converged and sigma_max(V) / sigma_min(V) is at most about 10; elsewhere it is
            bounded. "jvp" is the derivative of the schedule, with the normaliser a constant: at any
            conditioning, in 2.5 times the products.
        steps: conjugate gradient steps, 8 by default and 40 in float64.
        form: published iteration that backend "reference" runs: "newton" (LOT, 10 steps) or
            "bjorck" (BCOP, 20 steps).
        return_residual: also return ||I - X X^H||_F, X the matrix before the last step (the result
            for backend "reference"), without a gradient. Where this is r, W W^H is within
            3/4 r^2 + 1/4 r^3 of the identity.
        backend: "triton" (float32), "cuda", "torch" or "reference"; None takes the forced backend
            (`lipfast.set_backend`), or else the fastest that can run.

    Returns:
        W of the shape, dtype and device of `matrix`; with `return_residual` also the residuals, one
        real number for each matrix.

    Raises:
        TypeError: matrix or ridge is no tensor (or number) or has another dtype.
        ValueError: another argument does not fit, or the backend cannot run; the error says why.

    Source: Xu, Li, Li, "LOT: layer-wise orthogonal training", NeurIPS 2022, algorithm 1; Bjorck,
    Bowie, SIAM J. Numer. Anal. 8 (1971).
    """
    _check(matrix, planar, ridge, schedule, derivative, steps, form)
    with_ridge = isinstance(ridge, Tensor) or ridge != 0
    chosen = backends.choose("polar", matrix, planar, with_ridge, backend=backend)
    if matrix.dtype.itemsize < 4:
        w, residual = _polar(
            matrix.float(), planar, ridge, schedule, derivative, steps, form, chosen
        )
        w, residual = w.to(matrix.dtype), residual.to(matrix.dtype)
    else:
        w, residual = _polar(matrix, planar, ridge, schedule, derivative, steps, form, chosen)
    return (w, residual) if return_residual else w


def _check(
    matrix: Tensor,
    planar: bool,
    ridge: float | Tensor,
    schedule: str,
    derivative: str,
    steps: int | None,
    form: str,
) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"polar: matrix must be a torch.Tensor, got {type(matrix).__name__}")
    allowed = _REAL if planar else _REAL + _COMPLEX
    if matrix.dtype not in allowed:
        raise TypeError(
            f"polar: the dtype of matrix must be one of {', '.join(map(str, allowed))}"
            f"{' with planar=True' if planar else ''}, got {matrix.dtype}"
        )
    if matrix.dim() < 2 + planar or (planar and matrix.shape[-3] != 2):
        raise ValueError(
            f"polar: matrix must have the shape {'(..., 2, m, n)' if planar else '(..., m, n)'}, "
            f"got {tuple(matrix.shape)}"
        )
    _check_ridge(ridge, matrix, matrix.shape[: -3 if planar else -2])
    if form == "bjorck" and (isinstance(ridge, Tensor) or ridge != 0):
        raise ValueError(f"polar: ridge must be 0 with form 'bjorck', got {ridge!r}")
    for name, value, choices in (
        ("schedule", schedule, SCHEDULES),
        ("derivative", derivative, _DERIVATIVES),
        ("form", form, _FORMS),
    ):
        if value not in choices:
            raise ValueError(f"polar: {name} must be one of {', '.join(choices)}, got {value!r}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"polar: steps must be a positive int or None, got {steps!r}")


def _check_ridge(ridge: float | Tensor, matrix: Tensor, batch: Sequence[int]) -> None:
    if isinstance(ridge, Tensor):
        sizes = zip(reversed(ridge.shape), reversed(batch), strict=False)
        fits = ridge.dim() <= len(batch) and all(a in (1, b) for a, b in sizes)
        if not fits or ridge.is_complex():
            raise ValueError(
                "polar: ridge must be a real number or a real tensor that broadcasts with the "
                f"batch {tuple(batch)}, got a tensor of shape {tuple(ridge.shape)} and dtype "
                f"{ridge.dtype}"
            )
        if ridge.device != matrix.device:
            raise ValueError(
                f"polar: ridge must be on the device {matrix.device} of matrix, got {ridge.device}"
            )
    elif not isinstance(ridge, int | float):
        raise TypeError(f"polar: ridge must be a number or a tensor, got {type(ridge).__name__}")
    elif not 0 <= ridge < math.inf:
        raise ValueError(f"polar: ridge must be finite and at least 0, got {ridge!r}")


def _triton_can_run(matrix: Tensor, planar: bool = False, ridge: bool = False) -> str | None:
    if matrix.dtype in (torch.float64, torch.complex128):
        return f"it computes in float32, and matrix has {str(matrix.dtype).removeprefix('torch.')}"
    return backends.triton_can_run(matrix)


def _cuda_can_run(matrix: Tensor, planar: bool = False, ridge: bool = False) -> str | None:
    reason = backends.cuda_can_run(matrix)
    return reason or launcher("cuda").can_run(matrix, planar=planar, ridge=ridge)


backends.register(
    "polar",
    {
        "triton": _triton_can_run,
        "cuda": _cuda_can_run,
        "torch": lambda *_: None,
        "reference": lambda *_: None,
    },
)


def _polar(
    matrix: Tensor,
    planar: bool,
    ridge: float | Tensor,
    schedule: str,
    derivative: str,
    steps: int | None,
    form: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if matrix.numel() == 0:
        return matrix.clone(), matrix.real.new_zeros(matrix.shape[: -3 if planar else -2])
    if backend == "reference":
        return _published(matrix, planar, ridge, form)
    if matrix.is_complex():
        parts = torch.view_as_real(matrix).movedim(-1, -3)
        w, residual = _polar(parts, True, ridge, schedule, derivative, steps, form, backend)
        return torch.complex(*w.unbind(-3)), residual
    if steps is None:
        steps = 40 if matrix.dtype == torch.float64 else 8
    planes = matrix if planar else matrix.unsqueeze(-3)
    # The transpose of a polar factor, not only its adjoint, is the polar factor of the transpose.
    tall = planes.shape[-2] > planes.shape[-1]
    wide = _with_ridge(planes.mT if tall else planes, ridge)
    x = wide.reshape(-1, *wide.shape[-3:])
    w, residual = polar_op(x, schedule, derivative, steps, backend)
    w = w.view(wide.shape)
    if wide.shape[-1] > max(planes.shape[-2:]):
        w = w[..., : max(planes.shape[-2:])]
    w = w.mT if tall else w
    return w if planar else w.squeeze(-3), residual.view(planes.shape[:-3])


def _with_ridge(wide: Tensor, ridge: float | Tensor) -> Tensor:
    """Append sqrt(ridge) I: V V^H + ridge I is the Gram matrix of these rows."""
    if not isinstance(ridge, Tensor) and ridge == 0:
        return wide
    if isinstance(ridge, Tensor):
        root = ridge.detach().to(wide.dtype).sqrt()
    else:
        root = wide.new_full((), math.sqrt(ridge))
    rows = wide.shape[-2]
    columns = wide.new_zeros(*root.shape, wide.shape[-3], rows, rows)
    identity = torch.eye(rows, dtype=wide.dtype, device=wide.device)
    columns[..., 0, :, :] = identity * root[..., None, None]
    return torch.cat([wide, columns.expand(*wide.shape[:-1], rows)], dim=-1)


def _published(
    matrix: Tensor, planar: bool, ridge: float | Tensor, form: str
) -> tuple[Tensor, Tensor]:
    if planar:
        w, residual = _published(torch.complex(*matrix.unbind(-3)), False, ridge, form)
        return torch.stack([w.real, w.imag], dim=-3), residual
    scaled, scale = reference.unit_scale(matrix, dim=(-2, -1))
    if form == "newton":
        if isinstance(ridge, Tensor):
            ridge = ridge[..., None, None]
        w = reference.polar(scaled, ridge=ridge / scale**2)
    else:
        norm = reference.schatten_bound(scaled.detach())
        w = reference.bjorck(scaled * reference.inverse_or_zero(norm)[..., None, None])
    rows = w.detach() if w.shape[-2] <= w.shape[-1] else w.detach().mH
    identity = torch.eye(rows.shape[-2], dtype=w.dtype, device=w.device)
    return w, torch.linalg.matrix_norm(rows @ rows.mH - identity)
