"""A polynomial of a skew-symmetric convolution applied to a map (SOC)."""

import math
from typing import Any

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import skew_exp_cuda
from lipfast.ops.context import autocast_dtype
from lipfast.ops.skew_exp_derivative import ratios, to_layout
from lipfast.reference import conv2d_same, matrix_polynomial, skew_polynomial

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def skew_exp(
    x: Tensor,  # (n, c, h, w)
    kernel: Tensor,  # (c, c, kh, kw)
    coefficients: tuple[float, ...],
    padding_mode: str = "zeros",
    *,
    save: str = "terms",
    backend: str | None = None,
) -> Tensor:
    """Return p(L) x = sum_k a_k L^k x, L the skew-symmetric convolution with `kernel`.

    Differentiable in x and kernel, any number of times. The derivative takes L^T = -L for granted:
    of other kernels the value is right and the derivative is not. The backward pass runs the same
    recurrence with -L and one weight gradient over all terms. A 1x1 kernel on at least c vectors
    becomes the matrix p(L), applied once. Derivation: docs/math/skew_exp.md.

    Under autocast the convolutions run in its dtype; the sums keep the dtype of x.

    Args:
        x: (n, c, h, w), float64, float32, bfloat16 or float16; n may be 0. Contiguous and
            channels-last memory is used as it is, other memory is copied first.
        kernel: (c, c, kh, kw), odd kh and kw, with L^T = -L (`lipfast.reference.skew_kernel`).
        coefficients: a_0, ..., a_n, none of them 0, n >= 1: see `lipfast.reference`,
            `taylor_coefficients` and `unimodular_coefficients`.
        padding_mode: "zeros" or "circular".
        save: "terms" keeps n maps for the backward pass, "input" keeps x and computes them again.
        backend: "triton" (not float64), "cuda", "torch" or "reference", which is the plain sum with
            torch's derivative, whatever `save` says; None takes the forced backend
            (`lipfast.set_backend`), or else the fastest that can run.

    Returns:
        y: (n, c, h, w), dtype, device and memory format of x.

    Raises:
        TypeError: x or kernel is no tensor, or its dtype is another one than that of x without
            autocast.
        ValueError: a shape, a coefficient or an option is wrong, or the backend cannot run.

    Source: Singla, Feizi, "Skew orthogonal convolutions", ICML 2021, equation 8.
    """
    dtype = _check(x, kernel, coefficients, padding_mode, save)
    chosen = backends.choose("skew_exp", x, kernel, len(coefficients) - 1, dtype, backend=backend)
    if chosen == "reference":
        return skew_polynomial(x, kernel, coefficients, padding_mode)
    if chosen == "torch" and _is_cheaper_as_a_matrix(x, kernel):
        return _apply_matrix(x, kernel, coefficients, dtype)
    if chosen == "torch" and save == "terms" and not x.is_cuda:
        return _composed(x, kernel, coefficients, padding_mode)
    needs_terms = torch.is_grad_enabled() and kernel.requires_grad
    return torch.ops.lipfast.skew_exp(
        x, kernel, coefficients, padding_mode, save == "terms" and needs_terms, chosen, dtype
    )[0]


def _check(
    x: Tensor, kernel: Tensor, coefficients: tuple[float, ...], padding_mode: str, save: str
) -> torch.dtype:
    """Return the dtype of the convolutions."""
    for name, value in {"x": x, "kernel": kernel}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"skew_exp: {name} must be a torch.Tensor, got {type(value).__name__}")
    dtype = autocast_dtype(x)
    for name, value in {"x": x, "kernel": kernel}.items():
        expected = _DTYPES if dtype is not None and name != "x" else (x.dtype,)
        if value.dtype not in expected or value.dtype not in _DTYPES:
            wanted = ", ".join(map(str, _DTYPES)) if name == "x" else f"{x.dtype} as that of x"
            raise TypeError(f"skew_exp: the dtype of {name} must be {wanted}, got {value.dtype}")
    if kernel.device != x.device:
        raise ValueError(
            f"skew_exp: kernel must be on the device {x.device} of x, got {kernel.device}"
        )
    if x.dim() != 4:
        raise ValueError(f"skew_exp: x must have the shape (n, c, h, w), got {tuple(x.shape)}")
    c = x.shape[1]
    if (
        kernel.dim() != 4
        or kernel.shape[0] != c
        or kernel.shape[1] != c
        or not all(k % 2 for k in kernel.shape[2:])
    ):
        raise ValueError(
            f"skew_exp: kernel must have the shape ({c}, {c}, kh, kw) with odd kh and kw, "
            f"got {tuple(kernel.shape)}"
        )
    if len(coefficients) < 2 or not all(a != 0 and math.isfinite(a) for a in coefficients):
        raise ValueError(
            "skew_exp: coefficients must be at least two finite numbers other than 0, "
            f"got {coefficients!r}"
        )
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"skew_exp: padding_mode must be 'zeros' or 'circular', got {padding_mode!r}"
        )
    if save not in ("terms", "input"):
        raise ValueError(f"skew_exp: save must be 'terms' or 'input', got {save!r}")
    return x.dtype if dtype is None else dtype


def _can_run(x: Tensor, kernel: Tensor, terms: int, dtype: torch.dtype) -> str | None:
    if x.is_meta:
        return "it needs tensors on a CPU or a CUDA GPU, got one on meta"
    return None


def _triton_can_run(x: Tensor, *others: Any) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in float32, and x has float64"
    return backends.triton_can_run(x) or _can_run(x, *others)


def _cuda_can_run(x: Tensor, kernel: Tensor, terms: int, dtype: torch.dtype) -> str | None:
    return _can_run(x, kernel, terms, dtype) or skew_exp_cuda.can_run(x, terms, dtype)


backends.register(
    "skew_exp",
    {
        "triton": _triton_can_run,
        "cuda": _cuda_can_run,
        "torch": _can_run,
        "reference": lambda *arguments: None,
    },
)


def _is_cheaper_as_a_matrix(x: Tensor, kernel: Tensor) -> bool:
    n, c, h, w = x.shape
    return kernel.shape[-2:] == (1, 1) and n * h * w >= c


def _apply_matrix(
    x: Tensor, kernel: Tensor, coefficients: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(kernel.dtype, torch.float32)
        matrix = matrix_polynomial(kernel[:, :, 0, 0].to(wide), coefficients).to(dtype)
        y = conv2d_same(x.to(dtype), matrix[:, :, None, None], None, "zeros")
    return y.to(x.dtype)


def _composed(
    x: Tensor, kernel: Tensor, coefficients: tuple[float, ...], padding_mode: str
) -> Tensor:
    """With torch's derivative: on a CPU faster than stacking the terms for one weight gradient."""
    x = to_layout(x)
    z = x
    for ratio in reversed(ratios(coefficients)):
        z = torch.add(x, conv2d_same(z, kernel, None, padding_mode), alpha=ratio)
    return z if coefficients[0] == 1 else coefficients[0] * z
