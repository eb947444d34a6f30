"""How many epochs fit into a time budget."""

from __future__ import annotations

import math
import time

import torch

from lipfast.report.experiment import Experiment
from lipfast.training import margin_cross_entropy

_WARMUP = 2
_MINIMUM_STEPS = 3
_MINIMUM_SECONDS = 1.0


def epochs_in(experiment: Experiment, hours: float) -> int:
    """Return how many training epochs of an experiment take `hours` on its device, at least 1.

    Raises ValueError where hours is not a positive number.
    """
    if not 0 < hours < math.inf:
        raise ValueError(f"hours: expected a number > 0, got {hours!r}")
    return max(1, int(3600 * hours / epoch_seconds(experiment)))


def epoch_seconds(experiment: Experiment) -> float:
    """Return the time in seconds of a training epoch, from at least three steps and a second.

    Two steps warm up. Batches are made, augmented and used as in training, with SGD and momentum.
    """
    model, loader = experiment.model(), experiment.train_loader()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    steps = math.ceil(len(experiment.train_set) / experiment.recipe["batch_size"])
    start, timed, done = 0.0, 0, 0
    while True:
        for x, y in loader:
            if done == _WARMUP:
                _synchronize(experiment.device)
                start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            margin_cross_entropy(model(x), y).backward()
            optimizer.step()
            done += 1
            timed = done - _WARMUP
            if timed >= _MINIMUM_STEPS:
                _synchronize(experiment.device)
                seconds = time.perf_counter() - start
                if seconds >= _MINIMUM_SECONDS or timed >= steps:
                    return seconds / timed * steps


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
