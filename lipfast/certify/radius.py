"""Margins and certified radii of classifiers with a known Lipschitz constant."""

import math

import torch
from torch import Tensor

RADII = (36 / 255, 72 / 255, 108 / 255, 1.0)
"""The radii at which the field reports certified robust accuracy, in units of the pixel range."""


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Return s_y - max_{j != y} s_j, negative or 0 where the prediction is wrong or tied.

    Args:
        scores: (n, k), k >= 2, floating point.
        labels: (n,), integers in [0, k).

    Returns:
        (n,), float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or labels do not fit.
    """
    differences = _score_differences(scores, labels)
    return differences.amin(dim=1)


def certified_radius(
    scores: Tensor,
    labels: Tensor,
    *,
    lipschitz: float = 1.0,
    head_weight: Tensor | None = None,
) -> Tensor:
    """Return the radius of the Euclidean ball around each input in which the class cannot change.

    margin / (sqrt2 L) for scores that are an L-Lipschitz function of the input (Tsuzuku et al.
    2018, proposition 1). Where the last layer is a plain linear one with rows w_i on top of an
    L-Lipschitz network, min_j (s_y - s_j) / (L norm(w_y - w_j)), exact for the pair.

    Args:
        scores: (n, k).
        labels: (n,), the true classes.
        lipschitz: L, of the map from inputs to scores, or to the inputs of the linear head.
        head_weight: (k, d), the rows w_i of a plain linear last layer.

    Returns:
        (n,), float64, in the units of the input; 0 where misclassified or tied.

    Raises:
        ValueError, TypeError: shapes, dtypes, labels or the constant do not fit.
    """
    if not (math.isfinite(lipschitz) and lipschitz > 0):
        raise ValueError(f"lipschitz: expected a positive number, got {lipschitz!r}")
    differences = _score_differences(scores, labels)
    if head_weight is None:
        slopes = torch.full_like(differences, math.sqrt(2.0))
    else:
        slopes = _pairwise_slopes(head_weight, labels, scores.shape[1])
    radius = torch.where(differences > 0, differences / (slopes * lipschitz), 0.0)
    return radius.amin(dim=1)


def certified_robust_accuracy(radius: Tensor, eps: float) -> float:
    """Return the fraction of samples with a certified radius above `eps`; a tie does not count.

    Args:
        radius: (n,), of `certified_radius`, n >= 1.
        eps: Euclidean radius in the units of the input, >= 0.
    """
    if radius.dim() != 1 or radius.numel() == 0:
        raise ValueError(f"radius: expected (n,) with n >= 1, got shape {tuple(radius.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    return float((radius > eps).double().mean())


def _score_differences(scores: Tensor, labels: Tensor) -> Tensor:
    """s_y - s_j (n, k), infinite at j = y; rows with NaN or Inf scores count as ties."""
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores: expected (n, k >= 2), got shape {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating-point dtype, got {scores.dtype}")
    if labels.shape != scores.shape[:1]:
        raise ValueError(f"labels: expected ({len(scores)},), got shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise ValueError(
            f"labels: expected integers in [0, {scores.shape[1]}), got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    wide = scores.double()
    index = labels.long()[:, None]
    finite = wide.isfinite().all(dim=1, keepdim=True)
    differences = torch.where(finite, wide.gather(1, index) - wide, 0.0)
    return differences.scatter(1, index, math.inf)


def _pairwise_slopes(head_weight: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    if head_weight.dim() != 2 or head_weight.shape[0] != n_classes:
        raise ValueError(
            f"head_weight: expected ({n_classes}, d), got shape {tuple(head_weight.shape)}"
        )
    if not bool(torch.isfinite(head_weight).all()):
        raise ValueError("head_weight: expected finite values, got NaN or Inf")
    wide = head_weight.double()
    # the direct difference: the Gram form of cdist cancels for rows that nearly agree
    distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    return distances[labels.long()]
