"""The transfer matrices of a circular convolution, planar, as one product with a table."""

import torch
from torch import Tensor

from lipfast.ops.context import why_not_transformed, without_autocast
from lipfast.reference.fourier_conv import kernel_spectrum as reference_spectrum

from .fourier_conv_dft import cached_table, phases

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernel_spectrum(kernel: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Return the transfer matrices of a circular convolution with `kernel` on maps of `map_size`.

    V(f) = sum_x kernel[:, :, x] exp(2 pi i f . (x - (k - 1) // 2) / n) at the frequencies of the
    real Fourier transform, f_x the faster index. Taps wrap around where the kernel is larger than
    the map. Linear in the kernel, and differentiable any number of times. Autocast does not
    apply. Derivation: docs/math/fourier_conv.md.

    Args:
        kernel: (out, in, kh, kw), or several in (batch, ...); float64, float32, bfloat16 or
            float16; kh and kw at least 1.
        map_size: (h, w), at least 1.

    Returns:
        (h (w // 2 + 1), 2, out, in), or (batch, ...), real parts before imaginary parts; float64
        for a kernel in float64, else float32.

    Raises:
        TypeError: kernel is no tensor or has another dtype.
        ValueError: kernel has another shape or no taps, or map_size is no pair of positive numbers.

    Source: Trockman, Kolter, "Orthogonalizing convolutional layers with the Cayley transform", ICLR
    2021, section 3; Xu et al., "LOT", NeurIPS 2022, section 3.2.
    """
    _check(kernel, map_size)
    if kernel.dtype.itemsize < 4:
        kernel = kernel.float()
    h, w = map_size
    if why_not_transformed(kernel) is None:
        return torch.ops.lipfast.kernel_spectrum(kernel, h, w)
    kernels = kernel.flatten(0, -4)  # the transform does not mix output channels
    spectrum = reference_spectrum(kernels, (h, w))
    planes = torch.stack([spectrum.real, spectrum.imag], dim=1)
    if kernel.dim() == 4:
        return planes
    return planes.unflatten(2, kernel.shape[:2]).movedim(2, 0)


def _check(kernel: Tensor, map_size: tuple[int, int]) -> None:
    if not isinstance(kernel, Tensor):
        raise TypeError(
            f"kernel_spectrum: kernel must be a torch.Tensor, got {type(kernel).__name__}"
        )
    if kernel.dtype not in _DTYPES:
        expected = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(
            f"kernel_spectrum: the dtype of kernel must be one of {expected}, got {kernel.dtype}"
        )
    if kernel.dim() not in (4, 5) or 0 in kernel.shape[-2:]:
        raise ValueError(
            "kernel_spectrum: kernel must have the shape (out, in, kh, kw) with kh and kw at least "
            f"1, with or without a batch dimension before it, got {tuple(kernel.shape)}"
        )
    sizes = (int, torch.SymInt)
    if len(map_size) != 2 or not all(isinstance(n, sizes) and n >= 1 for n in map_size):
        raise ValueError(
            f"kernel_spectrum: map_size must be two numbers h, w of at least 1, got {map_size!r}"
        )


def _forward(kernel: Tensor, h: int, w: int) -> Tensor:
    *batch, out_channels, in_channels, kh, kw = kernel.shape
    table = _table(kh, kw, h, w, kernel.dtype, kernel.device)
    with without_autocast(kernel):
        spectrum = table @ kernel.reshape(*batch, out_channels * in_channels, kh * kw).mT
    return spectrum.view(*batch, h * (w // 2 + 1), 2, out_channels, in_channels)


def _adjoint(grad: Tensor, kh: int, kw: int, h: int, w: int) -> Tensor:
    *batch, _, _, out_channels, in_channels = grad.shape
    table = _table(kh, kw, h, w, grad.dtype, grad.device)
    with without_autocast(grad):
        taps = grad.reshape(*batch, len(table), out_channels * in_channels).mT @ table
    return taps.view(*batch, out_channels, in_channels, kh, kw)


@cached_table
def _table(kh: int, kw: int, h: int, w: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and sines of 2 pi f . (x - (k - 1) // 2) / n, (2 F, kh kw), the parts alternating."""
    down = phases(h, h, _positions(kh), device)[:, None, :, None]
    angle = down + phases(w // 2 + 1, w, _positions(kw), device)[None, :, None, :]
    return torch.stack([angle.cos(), angle.sin()], dim=2).view(-1, kh * kw).to(dtype)


def _positions(taps: int) -> range:
    centre = (taps - 1) // 2
    return range(-centre, taps - centre)


def _forward_fake(kernel: Tensor, h: int, w: int) -> Tensor:
    *batch, out_channels, in_channels, _, _ = kernel.shape
    return kernel.new_empty(*batch, h * (w // 2 + 1), 2, out_channels, in_channels)


def _adjoint_fake(grad: Tensor, kh: int, kw: int, h: int, w: int) -> Tensor:
    *batch, _, _, out_channels, in_channels = grad.shape
    return grad.new_empty(*batch, out_channels, in_channels, kh, kw)


def _save_sizes(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    kernel, *map_size = inputs
    ctx.sizes = (*kernel.shape[-2:], *map_size)


def _gradient(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return torch.ops.lipfast.kernel_spectrum_adjoint(grad, *ctx.sizes), None, None


def _save_map_size(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.map_size = inputs[3:]


def _gradient_of_adjoint(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return torch.ops.lipfast.kernel_spectrum(grad, *ctx.map_size), None, None, None, None


torch.library.define("lipfast::kernel_spectrum", "(Tensor kernel, SymInt h, SymInt w) -> Tensor")
torch.library.impl("lipfast::kernel_spectrum", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::kernel_spectrum", _forward_fake)
torch.library.register_autograd("lipfast::kernel_spectrum", _gradient, setup_context=_save_sizes)

torch.library.define(
    "lipfast::kernel_spectrum_adjoint",
    "(Tensor grad, SymInt kh, SymInt kw, SymInt h, SymInt w) -> Tensor",
)
torch.library.impl("lipfast::kernel_spectrum_adjoint", ("cpu", "cuda"), _adjoint)
torch.library.register_fake("lipfast::kernel_spectrum_adjoint", _adjoint_fake)
torch.library.register_autograd(
    "lipfast::kernel_spectrum_adjoint", _gradient_of_adjoint, setup_context=_save_map_size
)
