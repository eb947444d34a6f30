"""Circular convolution by transfer matrices (Trockman and Kolter 2021; Xu et al. 2022)."""

from types import ModuleType

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops.context import by_torch, is_plain, without_autocast
from lipfast.reference.fourier_conv import fourier_conv as reference_fourier_conv

from . import fourier_conv_gemm
from .fourier_conv_dft import (
    from_batch,
    inverse,
    to_batch,
    transform,
)

_DTYPES = (torch.float64, torch.float32)
_SHORT_DTYPES = (torch.bfloat16, torch.float16)


def fourier_conv(x: Tensor, spectrum: Tensor, *, backend: str | None = None) -> Tensor:
    """Return irfft2(spectrum(f) rfft2(x)(f)), a circular convolution of every channel pair.

    The result is that of torch.fft for any spectrum: imaginary parts at f_x = 0 and w / 2 count
    only as far as they keep the result real. The backward pass keeps the spectrum and the
    transform of x, 1 + 2 / w times the size of x, and can be differentiated again. Products follow
    torch's setting for TF32 in float32 matrix products on CUDA; autocast does not apply.
    Derivation: docs/math/fourier_conv.md.

    Args:
        x: (n, in, h, w), the dtype of spectrum, or bfloat16 or float16 with a float32 spectrum,
            which are computed in float32; h and w at least 1, n, in and out may be 0.
        spectrum: (h (w // 2 + 1), 2, out, in), real parts before imaginary parts, as
            `kernel_spectrum` gives it; float64 or float32.
        backend: "triton" (float32), "torch" or "reference"; None takes the forced backend
            (`lipfast.set_backend`), or else the fastest that can run.

    Returns:
        y: (n, out, h, w), contiguous, dtype and device of x.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: a shape or device does not fit, or the backend cannot run; the error says why.

    Source: Trockman, Kolter, "Orthogonalizing convolutional layers with the Cayley transform", ICLR
    2021, section 3; Xu et al., "LOT", NeurIPS 2022, section 3.2.
    """
    _check(x, spectrum)
    chosen = backends.choose("fourier_conv", spectrum, x, backend=backend)
    dtype = x.dtype
    x = x.to(spectrum.dtype)
    if chosen == "reference":
        with without_autocast(x):
            y = reference_fourier_conv(x, torch.complex(spectrum[:, 0], spectrum[:, 1]))
        return y.to(dtype)
    if is_plain(x, spectrum):
        return _Eager.apply(x, spectrum, chosen)[0].to(dtype)
    return torch.ops.lipfast.fourier_conv(x, spectrum, chosen)[0].to(dtype)


def _check(x: Tensor, spectrum: Tensor) -> None:
    for name, value in (("x", x), ("spectrum", spectrum)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"fourier_conv: {name} must be a torch.Tensor, got {type(value).__name__}"
            )
    if spectrum.dtype not in _DTYPES:
        raise TypeError(
            "fourier_conv: the dtype of spectrum must be torch.float64 or torch.float32, "
            f"got {spectrum.dtype}"
        )
    short = _SHORT_DTYPES if spectrum.dtype == torch.float32 else ()
    fitting = (spectrum.dtype, *short)
    if x.dtype not in fitting:
        expected = ", ".join(str(dtype) for dtype in fitting)
        raise TypeError(
            f"fourier_conv: the dtype of x must be one of {expected} with a spectrum in "
            f"{spectrum.dtype}, got {x.dtype}"
        )
    if x.device != spectrum.device:
        raise ValueError(
            f"fourier_conv: spectrum must be on the device {x.device} of x, got {spectrum.device}"
        )
    if x.dim() != 4 or 0 in x.shape[2:]:
        raise ValueError(
            "fourier_conv: x must have the shape (n, in, h, w) with h and w at least 1, "
            f"got {tuple(x.shape)}"
        )
    channels, h, w = x.shape[1:]
    expected_shape = (h * (w // 2 + 1), 2, channels)
    if spectrum.dim() != 4 or (*spectrum.shape[:2], spectrum.shape[3]) != expected_shape:
        raise ValueError(
            f"fourier_conv: spectrum must have the shape ({h * (w // 2 + 1)}, 2, out, {channels}) "
            f"for x of the shape {tuple(x.shape)}, got {tuple(spectrum.shape)}"
        )


def _triton_can_run(spectrum: Tensor, x: Tensor) -> str | None:
    if spectrum.dtype == torch.float64:
        return "it computes in float32, and spectrum has float64"
    return backends.triton_can_run(spectrum)


backends.register(
    "fourier_conv",
    {
        "triton": _triton_can_run,
        "torch": lambda spectrum, x: None,
        "reference": lambda spectrum, x: None,
    },
)


def _products(backend: str) -> ModuleType:
    if backend == "triton":
        from lipfast.kernels import fourier_conv as triton_fourier_conv

        return triton_fourier_conv
    return fourier_conv_gemm


def _forward(x: Tensor, spectrum: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if x.numel() == 0 or spectrum.numel() == 0:
        y, x_hat = _forward_fake(x, spectrum, backend)
        return y.zero_(), x_hat.zero_()
    h, w = x.shape[2:]
    with without_autocast(x):
        x_hat = transform(x)
        y_hat = _products(backend).multiply(x_hat, to_batch(spectrum, h, w))
        return inverse(y_hat, h, w), x_hat


def _backward(grad: Tensor, x_hat: Tensor, spectrum: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if x_hat.numel() == 0 or spectrum.numel() == 0:
        grad_x, grad_spectrum = _backward_fake(grad, x_hat, spectrum, backend)
        return grad_x.zero_(), grad_spectrum.zero_()
    h, w = grad.shape[2:]
    products = _products(backend)
    with without_autocast(grad):
        grad_hat = transform(grad)
        grad_spectrum = from_batch(products.correlate(grad_hat, x_hat), h, w)
        grad_x_hat = products.multiply_adjoint(grad_hat, to_batch(spectrum, h, w))
        return inverse(grad_x_hat, h, w), grad_spectrum


def _forward_fake(x: Tensor, spectrum: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    n, channels, h, w = x.shape
    frequencies, _, out_channels, _ = spectrum.shape
    return x.new_empty(n, out_channels, h, w), x.new_empty(2, frequencies, n, channels)


def _backward_fake(
    grad: Tensor, x_hat: Tensor, spectrum: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    n, _, h, w = grad.shape
    return grad.new_empty(n, spectrum.shape[3], h, w), grad.new_empty(spectrum.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, spectrum, *ctx.options = inputs
    ctx.map_size = output[0].shape[2:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], spectrum)


def _gradient(  # type: ignore[no-untyped-def]
    ctx, grad: Tensor | None, grad_x_hat: Tensor | None, backward=None
):
    """`grad_x_hat`, of the transform of x, comes from a second derivative."""
    x_hat, spectrum = ctx.saved_tensors
    grad_x = grad_spectrum = None
    if grad is not None:
        if by_torch(grad):
            grad_x, grad_spectrum = _differentiable(grad, x_hat, spectrum, *ctx.options)
        else:
            backward = backward or torch.ops.lipfast.fourier_conv_backward
            grad_x, grad_spectrum = backward(grad, x_hat, spectrum, *ctx.options)
    if grad_x_hat is not None:
        more = torch.ops.lipfast.fourier_inverse(grad_x_hat, *ctx.map_size)
        grad_x = more if grad_x is None else grad_x + more
    return grad_x, grad_spectrum, None


def _differentiable(
    grad: Tensor, x_hat: Tensor, spectrum: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """`_backward` by differentiable operations: the op itself with the adjoint matrices."""
    real, imaginary = spectrum.unbind(1)
    adjoint = torch.stack([real.mT, -imaginary.mT], dim=1)
    grad_x, grad_hat = torch.ops.lipfast.fourier_conv(grad, adjoint, backend)
    with without_autocast(grad):
        (real, imaginary), (x_real, x_imaginary) = grad_hat.mT, x_hat
        products = torch.stack(
            [real @ x_real + imaginary @ x_imaginary, imaginary @ x_real - real @ x_imaginary]
        )
    return grad_x, from_batch(products, *grad.shape[2:])


class _Eager(torch.autograd.Function):
    """The op without a dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        y, x_hat = _forward(*inputs)
        # what the Fourier transform returns counts as a view, which no layer after it could change
        # in place, as nn.ReLU(inplace=True) does
        y = y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())
        _save(ctx, inputs, (y, x_hat))
        return y, x_hat

    @staticmethod
    def backward(ctx, grad, grad_x_hat):  # type: ignore[no-untyped-def]
        return _gradient(ctx, grad, grad_x_hat, _backward)


torch.library.define(
    "lipfast::fourier_conv", "(Tensor x, Tensor spectrum, str backend) -> (Tensor, Tensor)"
)
torch.library.impl("lipfast::fourier_conv", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::fourier_conv", _forward_fake)
torch.library.register_autograd("lipfast::fourier_conv", _gradient, setup_context=_save)

torch.library.define(
    "lipfast::fourier_conv_backward",
    "(Tensor grad, Tensor x_hat, Tensor spectrum, str backend) -> (Tensor, Tensor)",
)
torch.library.impl("lipfast::fourier_conv_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("lipfast::fourier_conv_backward", _backward_fake)
