"""Batch activation variance: an empirical check that a layer is not expansive."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def batch_activation_variance(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Return (1/b) sum_i norm(a_i - mean)^2 of the input and of every layer's output, in order.

    Through a 1-Lipschitz layer it cannot grow: an increase proves that a layer is not 1-Lipschitz,
    a non-increase proves nothing (Prach et al. 2024, section 4). The mode of the model is kept.

    Args:
        model: any module whose layers each take and return one tensor.
        x: (b, ...), b >= 1.

    Returns:
        {"input": ..., name of each module without children: ...}.
    """
    if x.dim() < 1 or len(x) == 0:
        raise ValueError(f"x: expected at least one sample, got shape {tuple(x.shape)}")
    variances = {"input": _variance(x)}
    handles = [
        module.register_forward_hook(partial(_record, variances, name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return variances


def _record(
    variances: dict[str, float], name: str, module: nn.Module, args: Any, output: Tensor
) -> None:
    variances[name] = _variance(output)


def _variance(activations: Tensor) -> float:
    wide = activations.detach().double().flatten(1)
    return float((wide - wide.mean(dim=0)).square().sum(dim=1).mean())
