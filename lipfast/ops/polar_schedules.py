"""Coefficients of the minimax steps of the polar factor, computed from their definition."""

import math
from functools import lru_cache
from typing import NamedTuple

Step = tuple[float, float, float]

CONTRACTING: Step = (1.5, -0.5, 0.0)  # the Newton-Schulz step, which maps [0, 2] into [0, 1]


class _Design(NamedTuple):
    lower: float
    margin: float


# Shortest first. `lower` is the smallest sigma_min / normaliser for which the schedule converges.
_DESIGNS = {
    "55n": _Design(0.2, 0.005),
    "535nn": _Design(0.07, 0.005),
    "5355nn": _Design(0.02, 0.005),
    "55555nn": _Design(0.003, 0.005),
    "555555nn": _Design(5e-4, 0.01),
}

SCHEDULES = tuple(_DESIGNS)


@lru_cache
def coefficients(schedule: str, double: bool = False) -> tuple[Step, ...]:
    """Return (a, b, c) of each step x -> a x + b x^3 + c x^5 of a named schedule.

    Each minimax step is the best odd polynomial of its degree on the interval that the step before
    leaves, widened on both sides by the design's margin so that rounding cannot leave it. As every
    step maps [0, 1 + e] into [0, 1 + e'] with e, e' < 1 and the last one [0, 2] into [0, 1], the
    composition maps [0, 1] into [0, 1].

    Args:
        schedule: "5" and "3" are minimax steps of degrees 5 and 3, "n" contracting steps.
        double: append contracting steps until the defect is below float64's rounding.
    """
    low, high = lower(schedule), 1.0
    margin = _DESIGNS[schedule].margin
    steps = []
    for kind in schedule:
        if kind == "n":
            steps.append(CONTRACTING)
            continue
        best = _best_quintic if kind == "5" else _best_cubic
        step, error = best(low * (1 - margin), high * (1 + margin))
        steps.append(step)
        low, high = 1 - error, 1 + error
    if double:
        while defect(steps, lower(schedule)) > 1e-14:
            steps.append(CONTRACTING)
    return tuple(steps)


def lower(schedule: str) -> float:
    """Return the smallest sigma_min / normaliser for which a named schedule converges."""
    return _DESIGNS[schedule].lower


def apply(steps: tuple[Step, ...] | list[Step], x: float) -> float:
    """Return the composition of the steps at x."""
    for a, b, c in steps:
        x *= a + (b + c * x * x) * x * x
    return x


def defect(steps: tuple[Step, ...] | list[Step], low: float) -> float:
    """Return an estimate of the largest |1 - p(x)^2| on [low, 1], on a geometric grid."""
    grid = 2000
    points = (low ** (i / grid) for i in range(grid + 1))
    return max(abs(1 - apply(steps, x) ** 2) for x in points)


def _best_cubic(low: float, high: float) -> tuple[Step, float]:
    # a x + b x^3 is 1 - error at both ends and 1 + error at its maximum, which this determines.
    peak = math.sqrt((low * low + low * high + high * high) / 3)
    b = -2 / (2 * peak**3 + low * high * (low + high))
    a = -3 * b * peak * peak
    return (a, b, 0.0), 1 - (a + b * low * low) * low


def _best_quintic(low: float, high: float) -> tuple[Step, float]:
    """Remez: values 1 -+ error in turns at the ends and at the two extrema in between."""
    inner = ((3 * low + high) / 4, (low + 3 * high) / 4)
    while True:
        points = (low, *inner, high)
        rows = [[x, x**3, x**5, (-1.0) ** i] for i, x in enumerate(points)]
        a, b, c, error = _solve(rows, [1.0] * 4)
        root = math.sqrt(9 * b * b - 20 * a * c)
        extrema = (math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)))
        moved = max(abs(x - y) for x, y in zip(extrema, inner, strict=True))
        inner = extrema
        if moved < 1e-12:  # convergence is quadratic: the next exchange would not move them
            return (a, b, c), error


def _solve(rows: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with pivoting of one small system."""
    size = len(right)
    table = [[*row, value] for row, value in zip(rows, right, strict=True)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(table[k][i]))
        table[i], table[pivot] = table[pivot], table[i]
        for k in range(size):
            if k != i:
                factor = table[k][i] / table[i][i]
                table[k] = [x - factor * y for x, y in zip(table[k], table[i], strict=True)]
    return [table[i][size] / table[i][i] for i in range(size)]
