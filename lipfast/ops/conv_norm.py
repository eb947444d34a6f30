"""Estimates of a convolution's spectral norm by an iteration that never starts anew."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from lipfast import backends
from lipfast.ops.context import by_torch, why_not_transformed, without_autocast
from lipfast.reference import circular_pad, power_iteration

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNFOLD_LIMIT = 64  # pixels up to which a weight gradient is faster as one matrix product


def conv_norm(
    kernel: Tensor,  # (out, in, kh, kw) or (batch, out, in, kh, kw)
    vector: Tensor,  # (1, in, h, w) or (batch, in, h, w)
    padding_mode: str,
    *,
    steps: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return an estimate of the norm of a same-size convolution, and the next start vector.

    Each step takes the unit vector v with the longest image W v in the plane of the last one and of
    W^T W v, W the convolution with `kernel` on maps of the size of `vector`: a power iteration that
    keeps the best combination. Called once in every training step with the last call's vector it
    follows the norm of slowly changing weights. The estimate never exceeds the norm and may lie far
    below it: it proves nothing. Differentiable in the kernel with the vector held constant, which
    is exact at convergence for a first derivative; a second one misses the vector's own. The
    backward pass keeps the two vectors and the norm, and is one weight gradient of a convolution.
    Nothing is read on the host. A vector that is 0 or not finite is replaced by a fixed one.
    Derivation: docs/math/conv_norm.md.

    Args:
        kernel: (out, in, kh, kw), odd kh and kw, or several in (batch, ...), which run in one
            grouped convolution; float64, float32, or bfloat16 and float16, computed in float32.
        vector: (1, in, h, w), or (batch, in, h, w), of any length; dtype and device of kernel.
        padding_mode: "zeros" or "circular".
        steps: number of iterations, at least 1.
        backend: "torch", or "reference", the published power iteration with torch's derivative;
            None takes the forced backend (`lipfast.set_backend`), or else "torch".

    Returns:
        norm without axes, or (batch,), and the new vector, without graph, shaped as `vector`.

    Raises:
        TypeError: kernel or vector is no tensor or has another dtype.
        ValueError: a shape, device, padding mode or number of steps does not fit, or the backend
            cannot run; the error says why.

    Source: Meunier, Delattre, Araujo, Allauzen, "A dynamical system perspective for Lipschitz
    neural networks", ICML 2022, algorithm 1.
    """
    _check(kernel, vector, padding_mode, steps)
    transformed = (
        why_not_transformed(kernel, vector) and (backend or backends.forced()) != "reference"
    )
    chosen = "torch" if transformed else backends.choose("conv_norm", kernel, backend=backend)
    dtype = kernel.dtype
    if dtype.itemsize < 4:
        kernel, vector = kernel.float(), vector.float()
    if chosen == "reference":
        norm, image = _published(kernel, vector, padding_mode, steps)
    elif transformed:
        norm, image = _transformable(kernel, vector, padding_mode, steps)
    else:
        norm, image, _ = torch.ops.lipfast.conv_norm(kernel, vector, padding_mode, steps)
    return norm.to(dtype), image.detach().to(dtype)


def _check(kernel: Tensor, vector: Tensor, padding_mode: str, steps: int) -> None:
    for name, value in (("kernel", kernel), ("vector", vector)):
        if not isinstance(value, Tensor):
            raise TypeError(f"conv_norm: {name} must be a torch.Tensor, got {type(value).__name__}")
    if kernel.dtype not in _DTYPES:
        expected = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(
            f"conv_norm: the dtype of kernel must be one of {expected}, got {kernel.dtype}"
        )
    if vector.dtype != kernel.dtype:
        raise TypeError(
            f"conv_norm: vector must have the dtype {kernel.dtype} of kernel, got {vector.dtype}"
        )
    if vector.device != kernel.device:
        raise ValueError(
            f"conv_norm: vector must be on the device {kernel.device} of kernel, "
            f"got {vector.device}"
        )
    if kernel.dim() not in (4, 5) or not all(k % 2 for k in kernel.shape[-2:]):
        raise ValueError(
            "conv_norm: kernel must have the shape (out, in, kh, kw) with odd kh and kw, with or "
            f"without a batch dimension before it, got {tuple(kernel.shape)}"
        )
    first = (len(kernel) if kernel.dim() == 5 else 1, kernel.shape[-3])
    if vector.dim() != 4 or vector.shape[:2] != first or 0 in vector.shape[2:]:
        raise ValueError(
            f"conv_norm: vector must have the shape ({first[0]}, {first[1]}, h, w) for a kernel "
            f"{tuple(kernel.shape)}, got {tuple(vector.shape)}"
        )
    if padding_mode not in ("zeros", "circular"):
        raise ValueError(
            f"conv_norm: padding_mode must be 'zeros' or 'circular', got {padding_mode!r}"
        )
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"conv_norm: steps must be an integer of at least 1, got {steps!r}")


backends.register("conv_norm", {"torch": lambda *x: None, "reference": lambda *x: None})


def _published(
    kernel: Tensor, vector: Tensor, padding_mode: str, steps: int
) -> tuple[Tensor, Tensor]:
    if kernel.dim() == 4:
        return power_iteration(kernel, vector, padding_mode, steps=steps)
    if len(kernel) == 0:
        return kernel.sum(dim=(1, 2, 3, 4)), vector
    pairs = [
        power_iteration(one, start[None], padding_mode, steps=steps)
        for one, start in zip(kernel, vector, strict=True)
    ]
    return torch.stack([norm for norm, _ in pairs]), torch.cat([image for _, image in pairs])


def _forward(
    kernel: Tensor, vector: Tensor, padding_mode: str, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm, v and W v / norm(W v), or 0 where W v is 0. One W and W^T for each step."""
    if kernel.numel() == 0:
        return tuple(x.zero_() for x in _forward_fake(kernel, vector, padding_mode, steps))  # type: ignore[return-value]
    kernels = kernel if kernel.dim() == 5 else kernel[None]
    index = torch.arange(vector[0].numel(), device=vector.device, dtype=vector.dtype)
    other, _ = _unit(index.cos().view(1, *vector.shape[1:]))
    with without_autocast(kernel):
        vector, length = _unit(vector)
        vector = torch.where((length > 0) & length.isfinite(), vector, other)
        image, norm = _unit(_convolve(vector, kernels, padding_mode))
        for _ in range(steps):
            ascent = _convolve_adjoint(image, kernels, padding_mode)
            ascent = _orthogonal(ascent, vector, other)
            step, length = _unit(_convolve(ascent, kernels, padding_mode))
            larger = torch.maximum(norm, length)
            first, second = (t / torch.where(larger > 0, larger, 1) for t in (norm, length))
            both = first * second * (image * step).sum(dim=(1, 2, 3), keepdim=True)
            angle = torch.atan2(2 * both, first**2 - second**2) / 2  # of the longest image
            vector, length = _unit(angle.cos() * vector + angle.sin() * ascent)
            image, norm = _unit(angle.cos() * first * image + angle.sin() * second * step)
            norm = norm * larger / length
        vector = torch.where(norm.isfinite(), vector, other)
    return norm.flatten()[0] if kernel.dim() == 4 else norm.flatten(), vector, image


def _orthogonal(x: Tensor, vector: Tensor, other: Tensor) -> Tensor:
    """The unit vector of x, or of `other` where x is along `vector`, less its part along it."""
    for _ in range(2):  # the first difference may be rounding and nothing else
        x, length = _unit(x)
        x = torch.where(length > 0, x, other)
        x = x - (x * vector).sum(dim=(1, 2, 3), keepdim=True) * vector
    return _unit(x)[0]


def _transformable(
    kernel: Tensor, vector: Tensor, padding_mode: str, steps: int
) -> tuple[Tensor, Tensor]:
    """The op by operations that torch.func can transform."""
    _, vector, _ = _forward(kernel.detach(), vector.detach(), padding_mode, steps)
    kernels = kernel if kernel.dim() == 5 else kernel[None]
    norms = _convolve(vector, kernels, padding_mode).flatten(1).norm(dim=1)
    return norms if kernel.dim() == 5 else norms[0], vector


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (batch, c, h, w) scaled to length 1, or 0, and its length (batch, 1, 1, 1).

    Divided by the largest entry first, so that the squares neither overflow nor vanish.
    """
    largest = x.abs().amax(dim=(1, 2, 3), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    return x / torch.where(length > 0, length, 1), length * largest


def _convolve(x: Tensor, kernels: Tensor, padding_mode: str) -> Tensor:
    """Convolve each image of x (batch, in, h, w) with its own kernel (batch, out, in, kh, kw)."""
    batch, out_channels, _, kh, kw = kernels.shape
    h, w = x.shape[2:]
    if kh == kw == 1:
        return (kernels.flatten(2) @ x.flatten(2)).view(batch, out_channels, h, w)
    padding = (kh // 2, kw // 2)
    if padding_mode == "circular":
        x, padding = circular_pad(x, *padding), (0, 0)
    grouped = x.reshape(1, -1, *x.shape[2:])
    y = torch.conv2d(grouped, kernels.flatten(0, 1), padding=padding, groups=batch)
    return y.view(batch, out_channels, h, w)


def _convolve_adjoint(y: Tensor, kernels: Tensor, padding_mode: str) -> Tensor:
    batch, _, in_channels, kh, kw = kernels.shape
    h, w = y.shape[2:]
    if kh == kw == 1:
        return (kernels.flatten(2).mT @ y.flatten(2)).view(batch, in_channels, h, w)
    padding = (kh // 2, kw // 2)
    if padding_mode == "circular":  # what the padding adds to the result is cut off again
        y, padding = circular_pad(y, *padding), (2 * padding[0], 2 * padding[1])
    grouped = y.reshape(1, -1, *y.shape[2:])
    x = F.conv_transpose2d(grouped, kernels.flatten(0, 1), padding=padding, groups=batch)
    return x.view(batch, in_channels, h, w)


def _backward(
    grad: Tensor, vector: Tensor, image: Tensor, taps: list[int], padding_mode: str
) -> Tensor:
    """Return grad_b image_b v_b^T, restricted to the taps, as (batch, out, in, kh, kw)."""
    batch, in_channels = vector.shape[:2]
    out_channels = image.shape[1]
    if vector.numel() == 0 or image.numel() == 0:
        return vector.new_zeros(batch, out_channels, in_channels, *taps)
    image = image * grad.view(-1, 1, 1, 1)
    with without_autocast(vector):
        if taps == [1, 1]:
            product = image.flatten(2) @ vector.flatten(2).mT
            return product.view(batch, out_channels, in_channels, 1, 1)
        padding = (taps[0] // 2, taps[1] // 2)
        if padding_mode == "circular":
            vector, padding = circular_pad(vector, *padding), (0, 0)
        if image[0, 0].numel() <= _UNFOLD_LIMIT:
            patches = F.unfold(vector, (taps[0], taps[1]), padding=padding)
            product = image.flatten(2) @ patches.mT
            return product.view(batch, out_channels, in_channels, *taps)
        gradient = conv2d_weight(
            vector.reshape(1, -1, *vector.shape[2:]),
            [batch * out_channels, in_channels, *taps],
            image.reshape(1, -1, *image.shape[2:]),
            padding=padding,
            groups=batch,
        )
    return gradient.view(batch, out_channels, in_channels, *taps)


def _forward_fake(
    kernel: Tensor, vector: Tensor, padding_mode: str, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    norm = vector.new_empty(() if kernel.dim() == 4 else kernel.shape[:1])
    image = vector.new_empty(len(vector), kernel.shape[-4], *vector.shape[2:])
    return norm, torch.empty_like(vector, memory_format=torch.contiguous_format), image


def _backward_fake(
    grad: Tensor, vector: Tensor, image: Tensor, taps: list[int], padding_mode: str
) -> Tensor:
    return vector.new_empty(len(vector), image.shape[1], vector.shape[1], *taps)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    kernel, _, ctx.padding_mode, _ = inputs
    ctx.shape = kernel.shape
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _gradient(  # type: ignore[no-untyped-def]
    ctx, grad: Tensor | None, _: None, grad_image: Tensor | None
):
    """`grad_image` comes from a second derivative: norm = |W v| and image = W v / norm."""
    norm, vector, image = ctx.saved_tensors
    taps = list(ctx.shape[-2:])
    if by_torch(grad) or grad_image is not None:
        total = torch.zeros_like(image) if grad is None else grad.view(-1, 1, 1, 1) * image
        if grad_image is not None:
            along = (image * grad_image).sum(dim=(1, 2, 3), keepdim=True)
            norms = norm.view(-1, 1, 1, 1)
            total = total + (grad_image - along * image) / torch.where(norms == 0, 1, norms)
        ones = torch.ones_like(norm)
        gradient = _backward(ones, vector.detach(), total, taps, ctx.padding_mode)
    elif grad is None:
        return None, None, None, None
    else:
        gradient = torch.ops.lipfast.conv_norm_backward(grad, vector, image, taps, ctx.padding_mode)
    return gradient.view(ctx.shape), None, None, None


torch.library.define(
    "lipfast::conv_norm",
    "(Tensor kernel, Tensor vector, str padding_mode, int steps) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("lipfast::conv_norm", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::conv_norm", _forward_fake)
torch.library.register_autograd("lipfast::conv_norm", _gradient, setup_context=_save)

torch.library.define(
    "lipfast::conv_norm_backward",
    "(Tensor grad, Tensor vector, Tensor image, SymInt[] taps, str padding_mode) -> Tensor",
)
torch.library.impl("lipfast::conv_norm_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("lipfast::conv_norm_backward", _backward_fake)
