"""What one training run is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .loss import OFFSET, TEMPERATURE


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Hyperparameters of one training run.

    Args:
        epochs: passes over the training set, at least 1.
        lr: highest learning rate of the one-cycle schedule, positive.
        weight_decay: L2 penalty of SGD, at least 0.
        batch_size: samples per step over all processes together, at least 1.
        momentum: of SGD, constant, 0 to below 1.
        seed: of order and augmentation, at least 0; the loader's.
        autocast: run the network under bfloat16 autocast; the loss stays in float32.
        offset: of `margin_cross_entropy`.
        temperature: of `margin_cross_entropy`.
        device: torch device on which to train.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range.
    """

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int = 256
    momentum: float = 0.9
    seed: int = 0
    autocast: bool = False
    offset: float = OFFSET
    temperature: float = TEMPERATURE
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("lr", "weight_decay", "momentum", "offset", "temperature"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        for name in ("lr", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if not isinstance(self.autocast, bool):
            raise TypeError(f"autocast must be a bool, got {self.autocast!r}")
        if not isinstance(self.device, str):
            raise TypeError(f"device must be a string, got {self.device!r}")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(
                f'device must be a torch device such as "cpu" or "cuda:0", got {self.device!r}'
            ) from error
