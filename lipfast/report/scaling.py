"""How time and memory of a layer grow with its channels and with its maps."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lipfast.nn import METHODS
from lipfast.report.cost_model import training_cost
from lipfast.report.machine import machine_description, software_versions
from lipfast.report.measure import median_seconds, out_of_memory
from lipfast.saved import saved_bytes

CHANNELS = (16, 32, 64, 128, 256, 512, 1024, 2048)
SIDES = (4, 8, 16, 32, 64, 112, 224)
KERNEL_SIZE = 3
FIXED = {"channels": ("side", 8), "side": ("channels", 32)}  # what stays while the other grows
PLAIN = "conv"


@dataclass(frozen=True)
class Point:
    """One layer of one size.

    `seconds` is the median time of a training step, forward and backward, where `measured`;
    elsewhere the time of the largest smaller size that was measured times the ratio of the
    multiply-adds. `saved_bytes` is what the forward pass keeps for the backward pass, the input
    included and the parameters not, counted with tensors that have no values.
    """

    method: str
    axis: str
    channels: int
    side: int
    batch: int
    seconds: float
    measured: bool
    multiply_adds: float
    saved_bytes: int


@dataclass(frozen=True)
class Scaling:
    """The points, and what they were measured on."""

    points: tuple[Point, ...]
    device: str
    machine: str
    versions: dict[str, str]

    def curve(self, method: str, axis: str) -> tuple[Point, ...]:
        """Return the points of a method along "channels" or "side", ascending."""
        chosen = [p for p in self.points if (p.method, p.axis) == (method, axis)]
        return tuple(sorted(chosen, key=lambda p: getattr(p, axis)))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods with points, in the order in which they were measured."""
        return tuple(dict.fromkeys(p.method for p in self.points))

    def csv(self) -> str:
        """Return one CSV row per point."""
        names = [field.name for field in dataclasses.fields(Point)]
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(point) for point in self.points)
        return text.getvalue()


def measure_scaling(
    methods: Sequence[str],
    *,
    channels: Sequence[int] = CHANNELS,
    sides: Sequence[int] = SIDES,
    batch: int = 16,
    seconds_per_step: float = 1.0,
    device: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
) -> Scaling:
    """Measure training steps of 3x3 layers of growing size, as far as they are fast enough.

    Channels grow on maps of 8 x 8, maps grow with 32 channels. Along each curve the sizes are
    measured in ascending order until the next one is predicted to take longer than
    `seconds_per_step` or does not fit in memory; beyond it, times are computed.

    Args:
        methods: keys of `lipfast.nn.METHODS`, and "conv" for `torch.nn.Conv2d`.
        channels: of input and output.
        sides: heights and widths of the maps.
        batch: maps per step.
        seconds_per_step: the longest step to measure; the first of each curve always is.
        device: where to measure.
        log: called with one line per curve.

    Raises:
        ValueError: unknown method, or a number out of range.
    """
    if not seconds_per_step > 0:
        raise ValueError(f"seconds_per_step: expected a number > 0, got {seconds_per_step!r}")
    points: list[Point] = []
    for axis, values in (("channels", channels), ("side", sides)):
        name, fixed = FIXED[axis]
        for method in methods:
            sizes = [{axis: value, name: fixed} for value in sorted(values)]
            curve = _curve(method, axis, sizes, batch, seconds_per_step, device)
            points += curve
            measured = sum(p.measured for p in curve)
            log(f"{method}, {axis}: {measured} of {len(curve)} sizes measured")
    return Scaling(tuple(points), device, machine_description(device), software_versions())


def fitted_exponent(points: Sequence[Point], axis: str, value: str) -> float | None:
    """Return the slope of a value over an axis in the log-log plot, for the larger half.

    Args:
        points: of one curve.
        axis: "channels" or "side".
        value: "seconds", of which only measured points count, or "saved_bytes".

    Returns:
        The least-squares slope over the upper half of the points, at least two; None where fewer
        than two count.
    """
    counted = [p for p in points if p.measured or value != "seconds"]
    upper = sorted(counted, key=lambda p: getattr(p, axis))[-max(2, math.ceil(len(counted) / 2)) :]
    if len(upper) < 2:
        return None
    x = np.log([getattr(p, axis) for p in upper])
    y = np.log([getattr(p, value) for p in upper])
    return float(np.polyfit(x, y, 1)[0])


def _curve(
    method: str, axis: str, sizes: list[dict[str, int]], batch: int, limit: float, device: str
) -> list[Point]:
    points: list[Point] = []
    last: tuple[float, float] | None = None  # seconds and multiply-adds of the last measured size
    reachable = True
    for size in sizes:
        work = training_cost(method, **size, batch=batch, kernel_size=KERNEL_SIZE).total
        seconds = None
        if last is not None:
            predicted = last[0] * work / last[1]
            reachable = reachable and predicted <= limit
        if reachable:
            seconds = _step_seconds(method, size["channels"], size["side"], batch, device)
            reachable = seconds is not None
        measured = seconds is not None
        if seconds is not None:
            last = (seconds, work)
        elif last is None:
            raise ValueError(f"{method}: the smallest size does not fit in the memory of {device}")
        else:
            seconds = last[0] * work / last[1]
        kept = _kept_bytes(method, size["channels"], size["side"], batch, device)
        points.append(
            Point(method, axis, **size, batch=batch, seconds=seconds, measured=measured,
                  multiply_adds=work, saved_bytes=kept)
        )  # fmt: skip
    return points


def _layer(method: str, channels: int, **factory: Any) -> nn.Module:
    if method == PLAIN:
        return nn.Conv2d(channels, channels, KERNEL_SIZE, padding=KERNEL_SIZE // 2, **factory)
    return METHODS[method].conv(channels, channels, KERNEL_SIZE, **factory)


def _step_seconds(method: str, channels: int, side: int, batch: int, device: str) -> float | None:
    """None where the memory is too small."""
    try:
        layer = _layer(method, channels, device=device)
        x = torch.randn(batch, channels, side, side, device=device, requires_grad=True)
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return median_seconds(
            lambda: torch.autograd.grad(layer(x).square().sum(), inputs), x.device
        )
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def _kept_bytes(method: str, channels: int, side: int, batch: int, device: str) -> int:
    with FakeTensorMode():
        layer = _layer(method, channels, device=device)
        x = torch.empty(batch, channels, side, side, device=device, requires_grad=True)
        return saved_bytes(lambda: layer(x), *layer.parameters())
