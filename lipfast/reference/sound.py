"""Steps that turn weights of any origin into weights with a proved norm (used for evaluation)."""

import torch
from torch import Tensor

from .conv_norm import schatten_bound


def unit_scale(
    weight: Tensor, *, minimum: float = 0.0, dim: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Return weight / s and s = max(largest entry, minimum), s = 1 for a zero weight.

    A constant for the gradient: meant for maps that do not depend on s in exact arithmetic, so
    that squares of very large or very small weights neither overflow nor vanish. With `dim`, one s
    for each slice along these axes, which are kept.
    """
    scale = weight.detach().abs().amax(dim, keepdim=bool(dim)).clamp_min(minimum)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return weight / scale, scale


def contract(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix of spectral norm at most 1, near `matrix` where that is near orthogonal.

    One Newton-Schulz step W = 1.5 X - 0.5 X X^H X maps singular values in [0, 2] into [0, 1]
    whatever they are. That they are at most 2 is read off a Schatten bound, and X is `matrix`
    divided by that bound where they may not be. It also cuts a distance d of X X^H from the
    identity to about 0.75 d^2.

    Args:
        matrix: (..., m, n), real or complex, float64 or complex128 for a proof.

    Returns:
        W, and the largest norm bound of all matrices in the batch, rounding included.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        contracted, bound = contract(matrix.mH)
        return contracted.mH, bound
    norm = schatten_bound(matrix, squarings=4)
    above = norm > 2
    scaled = torch.where(above, 1 / torch.where(above, norm, 1), 1)[..., None, None] * matrix
    contracted = 1.5 * scaled - 0.5 * (scaled @ scaled.mH) @ scaled
    # NaN stays NaN
    bound = torch.where(norm >= 1, 1, 1.5 * norm - 0.5 * norm**3).amax()
    # the two products are off by (n + 2) eps times Frobenius norms, at most 2 sqrt(m) each
    rounding = 16 * matrix.shape[-2] * (matrix.shape[-1] + 2) * torch.finfo(norm.dtype).eps
    return contracted, bound + rounding


def round_contraction(weight: Tensor, bound: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast transfer matrices or taps to `dtype` so that the norm does not exceed max(1, bound).

    Each entry moves by at most half a unit in the last place, the operator therefore by at most
    the sum over the taps (out, in, kh, kw), or the largest over the frequencies (F, out, in), of
    the Frobenius norms of these movements; the weight is divided by 1 + that sum beforehand.

    Args:
        weight: (out, in, kh, kw) real or (F, out, in) complex, in double precision.
        bound: proved norm of the operator.
        dtype: real dtype to store in; complex weights are stored in complex64 or complex128.

    Returns:
        The cast weight and a bound of its norm.
    """
    target = dtype
    if weight.is_complex():
        target = torch.complex128 if dtype == torch.float64 else torch.complex64
    finfo = torch.finfo(target)
    size = weight.shape[0] * weight.shape[1] if weight.dim() == 4 else weight[0].numel()
    absolute = finfo.smallest_normal * finfo.eps * size**0.5
    if weight.dim() == 4:
        frobenius = weight.flatten(2).norm(dim=(0, 1)) * (finfo.eps / 2) + absolute
        movement = frobenius.sum()
    else:
        movement = (weight.norm(dim=(1, 2)) * (finfo.eps / 2) + absolute).amax()
    return (weight / (1 + movement)).to(target), (bound + movement) / (1 + movement)
