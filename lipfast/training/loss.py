"""The loss that asks for a margin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSET = 2 * math.sqrt(2) * 36 / 255
TEMPERATURE = 0.25


def margin_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    *,
    offset: float = OFFSET,
    temperature: float = TEMPERATURE,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy with a margin: t CE((s - u onehot(y)) / t, y).

    Args:
        scores: shape (b, k), one column per class; float16 and bfloat16 are taken to float32.
        labels: int64, shape (b,), values 0 to k - 1.
        offset: u, in units of the scores; the default, 2 sqrt(2) 36/255, asks for twice the margin
            that certifies radius 36/255.
        temperature: t, positive, in units of the scores.
        reduction: "mean" or "sum" over the batch.

    Returns:
        A scalar, float32 or the wider dtype of the scores.

    Source: Prach et al., "1-Lipschitz Layers Compared", CVPR 2024, section on training.

    Raises:
        TypeError: scores are not floating point, or labels are not int64.
        ValueError: wrong shapes, or an argument out of its range.
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(f"scores must have shape (b, k), got {tuple(scores.shape)}")
    if labels.shape != scores.shape[:1]:
        raise ValueError(f"labels must have shape ({scores.shape[0]},), got {tuple(labels.shape)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not math.isfinite(offset):
        raise ValueError(f"offset must be finite, got {offset}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    classes = torch.arange(scores.shape[1], device=scores.device)
    shifted = torch.where(classes == labels[:, None], scores - offset, scores)
    return temperature * F.cross_entropy(shifted / temperature, labels, reduction=reduction)
