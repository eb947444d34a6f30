"""gram_bound with a proved bound of its rounding (Higham 2002, section 3.1)."""

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops.context import without_autocast
from lipfast.ops.gram_bound import gram_bound


def gram_bound_above(
    weight: Tensor,
    q: Tensor | None = None,
    *,
    axis: str = "in",
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Return numbers that are at least the exact values of `gram_bound`, without a gradient.

    They exceed them by about n kh kw / 2^24 (float32) times the row sums of |weight| |weight|^T,
    n the channels that are summed over: much where terms cancel in the correlations. Derivation:
    docs/math/gram_bound.md, "Rounding".

    Args:
        weight: as for `gram_bound`, but float64 or float32.
        q: as for `gram_bound`.
        axis: as for `gram_bound`.
        groups: as for `gram_bound`.
        backend: as for `gram_bound`, but not "reference": convolutions may round otherwise.

    Raises:
        TypeError, ValueError: as `gram_bound`, and where products are not formed in weight's dtype
            or its dimensions are too large for it.
    """
    _check_products(weight, backend)
    with torch.no_grad(), without_autocast(weight):
        r = gram_bound(weight, q, axis=axis, groups=groups, backend=backend)
        if weight.numel() == 0:
            return r
        tap_sums = _tap_sums(weight, axis, groups)
        channels, depth = tap_sums.shape[-2:]
        scale = torch.ones_like(r) if q is None else q
        q_blocks = scale.unflatten(-1, (groups, channels))
        e = (tap_sums @ (tap_sums.mT @ q_blocks[..., None]))[..., 0].flatten(-2) / scale

        kh, kw = weight.shape[-2:] if weight.dim() >= 4 else (1, 1)
        terms, offsets = depth * kh * kw, (2 * kh - 1) * (2 * kw - 1)
        info = torch.finfo(weight.dtype)
        # What underflows, in a product of two weights or with q, or in a sum, is at most info.tiny.
        q_sums = q_blocks.sum(dim=-1, keepdim=True).expand_as(q_blocks).flatten(-2)
        lost = (2 * info.tiny * offsets * (terms + 2)) * ((q_sums + 2 * channels) / scale + 1)
        above = r / (1 - _gamma(offsets * channels + 1, info)) + _gamma(terms, info) * e + lost
        return above * (1 + _gamma(2 * depth + 2 * channels + kh * kw + 16, info))


def _tap_sums(weight: Tensor, axis: str, groups: int) -> Tensor:
    """Sums of |weight| over the taps, (..., groups, channels to correlate, channels to sum)."""
    first = weight.dim() % 2
    kernel = weight.flatten(first + 2) if weight.dim() >= 4 else weight[..., None]
    blocks = kernel.abs().sum(dim=-1).unflatten(first, (groups, -1))
    return blocks if axis == "out" else blocks.mT


def _check_products(weight: Tensor, backend: str | None) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"gram_bound_above: weight must be a torch.Tensor, got {type(weight).__name__}"
        )
    if weight.dtype not in (torch.float64, torch.float32):
        raise TypeError(
            "gram_bound_above: the dtype of weight must be torch.float64 or torch.float32, "
            f"got {weight.dtype}"
        )
    if backends.choose("gram_bound", weight, backend=backend) == "reference":
        raise ValueError(
            "gram_bound_above: backend 'reference' convolves, and how convolutions round is not "
            "known; expected another one"
        )
    if weight.dtype == torch.float32 and _shortens_float32():
        raise ValueError(
            "gram_bound_above: products of float32 must not be shortened; expected "
            "torch.set_float32_matmul_precision('highest')"
        )


def _shortens_float32() -> bool:
    """Whether torch may multiply float32 matrices in TF32 or bfloat16."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.get_float32_matmul_precision() != "highest"
    mkldnn = torch.backends.mkldnn
    products = (torch.backends.cuda.matmul, getattr(mkldnn, "matmul", None))
    places = (torch.backends, mkldnn, *products)
    settings = [getattr(place, "fp32_precision", "none") for place in places]
    return "tf32" in settings or "bf16" in settings


def _gamma(operations: int, info: torch.finfo) -> float:
    product = operations * info.eps / 2
    if product >= 0.5:
        raise ValueError(
            f"gram_bound_above: {operations} operations are too many for torch.{info.dtype}"
        )
    return product / (1 - product)
