"""The Cayley transform of a rectangular matrix (Trockman and Kolter 2021)."""

import math

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops.context import by_torch, is_plain, without_autocast
from lipfast.reference.cayley import cayley as reference_cayley

from . import cayley_cpp, cayley_lu

_REAL_DTYPES = (torch.float64, torch.float32)
_COMPLEX_DTYPES = (torch.complex128, torch.complex64)


def cayley(matrix: Tensor, *, planar: bool = False, backend: str | None = None) -> Tensor:
    """Return [(I + A)^(-1) (I - A); -2 V (I + A)^(-1)] for `matrix` = [U; V], A = U - U^H + V^H V.

    The result has orthonormal columns, or rows where there are more columns than rows (there the
    adjoint problem is solved). I + A is never singular: the real part of its numerical range is at
    least 1. The backward pass of a square matrix keeps the result alone, otherwise also the
    argument, and can be differentiated again. A NaN spoils its own matrix of the batch only.
    Derivation: docs/math/cayley.md.

    Args:
        matrix: (..., m, n), float64, float32, complex128 or complex64; with `planar`
            (..., 2, m, n), float64 or float32, real parts before imaginary parts. Batch, m and n
            may be 0.
        planar: whether `matrix` is a complex matrix in real and imaginary parts.
        backend: "cpp", "torch" or "reference"; None takes the forced backend
            (`lipfast.set_backend`), or else the fastest that can run.

    Returns:
        Shape, layout, dtype and device of matrix; contiguous.

    Raises:
        TypeError: matrix is no tensor or has another dtype.
        ValueError: the shape does not fit, or the backend cannot run; the error says why.

    Source: Trockman, Kolter, "Orthogonalizing convolutional layers with the Cayley transform", ICLR
    2021, section 3 and appendix C.
    """
    _check(matrix, planar)
    chosen = backends.choose("cayley", matrix, backend=backend)
    if chosen == "reference":
        if not planar:
            return reference_cayley(matrix)
        out = reference_cayley(torch.complex(matrix[..., 0, :, :], matrix[..., 1, :, :]))
        return torch.stack([out.real, out.imag], dim=-3)
    run = _Eager.apply if is_plain(matrix) else torch.ops.lipfast.cayley
    if matrix.is_complex():
        parts = torch.stack([matrix.real, matrix.imag], dim=-3)
        out = run(parts, True, chosen)
        return torch.complex(out[..., 0, :, :], out[..., 1, :, :])
    return run(matrix, planar, chosen)


def _check(matrix: Tensor, planar: bool) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"cayley: matrix must be a torch.Tensor, got {type(matrix).__name__}")
    dtypes = _REAL_DTYPES if planar else _REAL_DTYPES + _COMPLEX_DTYPES
    if matrix.dtype not in dtypes:
        expected = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(
            f"cayley: the dtype of matrix must be one of {expected}, got {matrix.dtype}"
        )
    if planar and (matrix.dim() < 3 or matrix.shape[-3] != 2):
        raise ValueError(
            f"cayley: a planar matrix must have the shape (..., 2, m, n), got {tuple(matrix.shape)}"
        )
    if matrix.dim() < 2:
        raise ValueError(
            f"cayley: matrix must have the shape (..., m, n), got {tuple(matrix.shape)}"
        )


backends.register(
    "cayley",
    {
        "cpp": backends.cpp_can_run,
        "torch": lambda matrix: None,
        "reference": lambda matrix: None,
    },
)


def _batched(matrix: Tensor, planar: bool) -> Tensor:
    """(batch, P, m, n) with m >= n: the adjoint of wide matrices."""
    batch = matrix.shape[: -3 if planar else -2]
    matrix = matrix.reshape(math.prod(batch), 1 + planar, *matrix.shape[-2:])
    return cayley_lu.adjoint(matrix) if matrix.shape[-1] > matrix.shape[-2] else matrix


def _restored(batched: Tensor, like: Tensor) -> Tensor:
    if like.shape[-1] > like.shape[-2]:
        batched = cayley_lu.adjoint(batched)
    return batched.reshape(like.shape).contiguous()


def _forward(matrix: Tensor, planar: bool, backend: str) -> Tensor:
    if matrix.numel() == 0:
        return _forward_fake(matrix, planar, backend)
    launcher = cayley_cpp if backend == "cpp" else cayley_lu
    with without_autocast(matrix):
        return _restored(launcher.cayley_forward(_batched(matrix, planar)), matrix)


def _backward(
    grad: Tensor, matrix: Tensor | None, out: Tensor, planar: bool, backend: str
) -> Tensor:
    if out.numel() == 0:
        return _forward_fake(out, planar, backend)
    grad, result = _batched(grad, planar), _batched(out, planar)
    rectangular = None if matrix is None else _batched(matrix, planar)
    launcher = cayley_cpp if backend == "cpp" else cayley_lu
    with without_autocast(out):
        return _restored(launcher.cayley_backward(grad, rectangular, result), out)


def _forward_fake(matrix: Tensor, planar: bool, backend: str) -> Tensor:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


def _backward_fake(
    grad: Tensor, matrix: Tensor | None, out: Tensor, planar: bool, backend: str
) -> Tensor:
    return _forward_fake(out, planar, backend)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    matrix, *ctx.options = inputs
    square = matrix.shape[-1] == matrix.shape[-2]
    ctx.save_for_backward(None if square else matrix, output)


def _gradient(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    if by_torch(grad):
        matrix, out = ctx.saved_tensors
        return _differentiable(grad, matrix, out, ctx.options[0]), None, None
    grad = torch.ops.lipfast.cayley_backward(grad, *ctx.saved_tensors, *ctx.options)
    return grad, None, None


def _differentiable(grad: Tensor, matrix: Tensor | None, out: Tensor, planar: bool) -> Tensor:
    """`_backward` by differentiable operations."""
    if out.numel() == 0:
        return torch.zeros_like(out)
    grad, result = _batched(grad, planar), _batched(out, planar)
    rectangular = None if matrix is None else _batched(matrix, planar)
    with without_autocast(out):
        return _restored(cayley_lu.cayley_differentiable(grad, rectangular, result), out)


class _Eager(torch.autograd.Function):
    """The op without a dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if by_torch(grad):
            return _gradient(ctx, grad)
        return _backward(grad, *ctx.saved_tensors, *ctx.options), None, None


torch.library.define("lipfast::cayley", "(Tensor matrix, bool planar, str backend) -> Tensor")
torch.library.impl("lipfast::cayley", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::cayley", _forward_fake)
torch.library.register_autograd("lipfast::cayley", _gradient, setup_context=_save)

torch.library.define(
    "lipfast::cayley_backward",
    "(Tensor grad, Tensor? matrix, Tensor out, bool planar, str backend) -> Tensor",
)
torch.library.impl("lipfast::cayley_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("lipfast::cayley_backward", _backward_fake)
