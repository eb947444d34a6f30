"""The one-cycle learning rate."""

from __future__ import annotations

import math

_WARM_UP = 0.3
_START = 1 / 25
_END = _START * 1e-4


def one_cycle(step: int, total_steps: int, max_lr: float) -> float:
    """Learning rate of one step: cosines from max_lr / 25 to max_lr and to max_lr / 250000.

    The rise takes the first 30 % of the steps. Equal to `torch.optim.lr_scheduler.OneCycleLR` with
    its default arguments, but a function of the step alone: there is no state to save.

    Args:
        step: counted from 0.
        total_steps: length of the whole training, in steps.
        max_lr: the highest learning rate.

    Source: L. N. Smith, N. Topin, "Super-Convergence", 2018; cosine form as in PyTorch.

    Raises:
        ValueError: step is not in 0..total_steps - 1.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step must be in 0..{total_steps - 1}, got {step}")
    peak = _WARM_UP * total_steps - 1
    if step <= peak:
        return max_lr * _cosine(_START, 1.0, step / peak)
    return max_lr * _cosine(1.0, _END, (step - peak) / (total_steps - 1 - peak))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))
