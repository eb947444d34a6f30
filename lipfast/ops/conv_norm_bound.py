"""Proved upper bounds of a convolution's spectral norm, for every map size, with derivatives."""

import math

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops.context import without_autocast
from lipfast.ops.conv_norm_schatten import schatten_norm
from lipfast.ops.gram_bound import gram_bound
from lipfast.reference import gram_bound as reference_gram_bound
from lipfast.reference import torus_bound, unfolding_bound, unit_scale

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNFOLDING_SQUARINGS = 5
_FREQUENCY_SQUARINGS = 4


def conv_norm_bound(
    kernel: Tensor,  # (out, in, kh, kw) or (batch, out, in, kh, kw)
    *,
    method: str = "unfolding",
    skew: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return an upper bound of the norm of a same-size convolution, for maps of every size.

    Holds for zero and circular padding, up to rounding in the dtype of the computation; float64
    makes it a proof. How much the methods exceed the norm and cost: docs/math/conv_norm.md.

    * "unfolding": sqrt(kh kw) times the smallest Schatten 64-norm of the kernel's four unfoldings,
      of the first two where the convolution is skew-symmetric.
    * "frequency": the largest Schatten 32-norm of the transfer matrices on a grid of 4 (k - 1)
      frequencies per axis, divided by cos(pi / 8) for each axis with more than one tap.
    * "gram": the square root of the largest row sum of the Gram operator (`gram_bound`).

    The derivatives of the Schatten norms are in closed form: the backward pass keeps the matrices
    and computes their powers again. They can be differentiated again.

    Args:
        kernel: (out, in, kh, kw), odd kh and kw, or several in (batch, ...); float64, float32, or
            bfloat16 and float16, computed in float32.
        method: see above.
        skew: the convolution is skew-symmetric, so that its unfoldings have equal norms in pairs.
        backend: "torch", or "reference", the published forms with torch's derivative; None takes
            the forced backend (`lipfast.set_backend`), or else "torch" where it can run.

    Returns:
        Tensor without axes, or (batch,), with the dtype of kernel; 0 for a zero kernel, NaN for one
        that is not finite.

    Raises:
        TypeError: kernel is no tensor or has another dtype.
        ValueError: a shape or the method is wrong, or the backend cannot run; the error says why.

    Source: Singla, Feizi, "Fantastic four", ICLR 2021, theorem 1; Delattre, Barthelemy, Araujo,
    Allauzen, "Efficient bound of Lipschitz constant for convolutional layers by Gram iteration",
    ICML 2023, theorem 1; Ehlich, Zeller, Math. Z. 86 (1964); Prach, Lampert, ECCV 2022, theorem 2.
    """
    _check(kernel, method)
    chosen = backends.choose("conv_norm_bound", kernel, backend=backend)
    dtype = kernel.dtype
    wide = kernel.float() if dtype.itemsize < 4 else kernel
    kernels = wide if kernel.dim() == 5 else wide[None]
    if kernels.numel() == 0:
        bounds = kernels.sum(dim=(1, 2, 3, 4))
    else:
        one = (_PUBLISHED if chosen == "reference" else _METHODS)[method]
        with without_autocast(kernels):
            kernels, scale = unit_scale(kernels, dim=(1, 2, 3, 4))
            bounds = one(kernels, skew) * scale.flatten()
    return (bounds if kernel.dim() == 5 else bounds[0]).to(dtype)


def _check(kernel: Tensor, method: str) -> None:
    if not isinstance(kernel, Tensor):
        raise TypeError(
            f"conv_norm_bound: kernel must be a torch.Tensor, got {type(kernel).__name__}"
        )
    if kernel.dtype not in _DTYPES:
        expected = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(
            f"conv_norm_bound: the dtype of kernel must be one of {expected}, got {kernel.dtype}"
        )
    if kernel.dim() not in (4, 5) or not all(k % 2 for k in kernel.shape[-2:]):
        raise ValueError(
            "conv_norm_bound: kernel must have the shape (out, in, kh, kw) with odd kh and kw, "
            f"with or without a batch dimension before it, got {tuple(kernel.shape)}"
        )
    if method not in _METHODS:
        raise ValueError(
            f"conv_norm_bound: method must be one of {', '.join(_METHODS)}, got {method!r}"
        )


backends.register(
    "conv_norm_bound", {"torch": lambda kernel: None, "reference": lambda kernel: None}
)


def _unfolding(kernels: Tensor, skew: bool) -> Tensor:
    batch, out_channels, in_channels, kh, kw = kernels.shape
    unfoldings = [kernels.flatten(2)]
    if kh == kw == 1:
        return schatten_norm(unfoldings[0], _UNFOLDING_SQUARINGS)
    unfoldings.append(kernels.transpose(2, 3).reshape(batch, out_channels * kh, in_channels * kw))
    if not skew:
        unfoldings.append(kernels.transpose(1, 2).flatten(2))
        other = kernels.permute(0, 1, 4, 2, 3)
        unfoldings.append(other.reshape(batch, out_channels * kw, in_channels * kh))
    norms = [schatten_norm(unfolding, _UNFOLDING_SQUARINGS) for unfolding in unfoldings]
    return math.sqrt(kh * kw) * torch.stack(norms).amin(dim=0)


def _frequency(kernels: Tensor, skew: bool) -> Tensor:
    batch, out_channels, in_channels, kh, kw = kernels.shape
    grid = _grid(kernels)
    table = _half_plane_table(kernels, grid)  # (2 F, kh kw)
    taps = kernels.reshape(batch, out_channels * in_channels, kh * kw)
    spectrum = (table @ taps.mT).view(batch, 2, -1, out_channels, in_channels)
    matrices = spectrum.transpose(1, 2)
    if len(table) == 2:  # one frequency, 0: real
        norms = schatten_norm(matrices[:, :, 0], _FREQUENCY_SQUARINGS)
    else:
        norms = schatten_norm(matrices, _FREQUENCY_SQUARINGS, planar=True)
    factor = math.cos(math.pi * (kh // 2) / grid[0]) * math.cos(math.pi * (kw // 2) / grid[1])
    return norms.amax(dim=1) / factor


def _gram(kernels: Tensor, skew: bool) -> Tensor:
    return _sqrt(gram_bound(kernels).amax(dim=1))


def _published_unfolding(kernels: Tensor, skew: bool) -> Tensor:
    squarings = _UNFOLDING_SQUARINGS
    return torch.stack([unfolding_bound(k, skew=skew, squarings=squarings) for k in kernels])


def _published_frequency(kernels: Tensor, skew: bool) -> Tensor:
    grid, squarings = _grid(kernels), _FREQUENCY_SQUARINGS
    return torch.stack([torus_bound(k, grid=grid, squarings=squarings) for k in kernels])


def _published_gram(kernels: Tensor, skew: bool) -> Tensor:
    return torch.stack([_sqrt(reference_gram_bound(kernel).amax()) for kernel in kernels])


_METHODS = {"unfolding": _unfolding, "frequency": _frequency, "gram": _gram}
_PUBLISHED = {
    "unfolding": _published_unfolding,
    "frequency": _published_frequency,
    "gram": _published_gram,
}


def _grid(kernel: Tensor) -> tuple[int, int]:
    kh, kw = kernel.shape[-2:]
    return (max(1, 4 * (kh - 1)), max(1, 4 * (kw - 1)))


def _half_plane_table(like: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosines, then sines, of the phases of each tap at the frequencies of the half plane."""
    kh, kw = like.shape[-2:]
    rows, columns = (
        torch.arange(f, device=like.device)[:, None]
        * (torch.arange(k, device=like.device) - k // 2)
        for f, k in ((grid[0], kh), (grid[1] // 2 + 1, kw))
    )
    turns = rows[:, None, :, None].double() / grid[0] + columns[None, :, None, :].double() / grid[1]
    angles = 2 * math.pi * turns.reshape(-1, kh * kw)
    return torch.cat([angles.cos(), angles.sin()]).to(like.dtype)


def _sqrt(squares: Tensor) -> Tensor:
    """Square roots with derivative 0 at 0."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())
