"""The schedules of polar: what they promise, computed on a fine grid in float64."""

import pytest
import torch
from torch import Tensor

from lipfast.ops.polar_schedules import CONTRACTING, SCHEDULES, Step, coefficients, lower

DEFECT = {"55n": 1.8e-4, "535nn": 2.4e-7, "5355nn": 1.8e-8, "55555nn": 1.1e-8, "555555nn": 3.3e-6}
ROUNDING = 1e-14


def apply(step: Step, x: Tensor) -> Tensor:
    a, b, c = step
    return a * x + b * x**3 + c * x**5


def grid(low: float, high: float) -> Tensor:
    """Uniform and geometric points, both ends included."""
    low_log = torch.tensor(max(low, 1e-8), dtype=torch.float64).log10().item()
    high_log = torch.tensor(high, dtype=torch.float64).log10().item()
    return torch.cat(
        [
            torch.linspace(low, high, 200001, dtype=torch.float64),
            torch.logspace(low_log, high_log, 200001, dtype=torch.float64).clamp(low, high),
        ]
    )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_never_leaves_the_unit_interval(schedule, double):
    x = grid(0, 1)
    *others, last = coefficients(schedule, double)
    for step in others:
        x = apply(step, x)
        assert x.min() >= 0
        assert x.max() < 2
    x = apply(last, x)
    assert x.min() >= 0
    assert x.max() <= 1 + ROUNDING


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_converges_from_its_lower_end_on(schedule):
    x = grid(lower(schedule), 1)
    exact = x
    for step in coefficients(schedule):
        x = apply(step, x)
    assert (1 - x**2).abs().max() <= DEFECT[schedule]
    for step in coefficients(schedule, True):
        exact = apply(step, exact)
    assert (1 - exact**2).abs().max() <= ROUNDING


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rounding_between_steps_does_no_harm(schedule):
    generator = torch.Generator().manual_seed(0)
    x = grid(0, 1)
    for step in coefficients(schedule)[:-1]:
        x = apply(step, x)
        x = x * (1 + 1e-3 * (2 * torch.rand(x.shape, dtype=x.dtype, generator=generator) - 1))
        assert x.max() < 2
    assert apply(CONTRACTING, x).max() <= 1 + ROUNDING


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_are_the_best_of_their_degree(schedule):
    """They take the errors -e, e, -e (, e) in turns on the interval that the steps before leave."""
    x = grid(lower(schedule) * (1 - (0.01 if schedule == "555555nn" else 0.005)), 1)
    low, high = x.min().item(), 1 + (0.01 if schedule == "555555nn" else 0.005)
    margin = high - 1
    for kind, step in zip(schedule, coefficients(schedule), strict=True):
        if kind == "n":
            assert step == CONTRACTING
            continue
        points = grid(low, high)
        error = apply(step, points[:200001]) - 1
        level = error.abs().max()
        touched = (error.abs() > level * (1 - 1e-6)).nonzero()[:, 0]
        signs = error[touched].sign().int().unique_consecutive().tolist()
        assert signs == ([-1, 1, -1, 1] if kind == "5" else [-1, 1, -1])
        low, high = (1 - level.item()) * (1 - margin), (1 + level.item()) * (1 + margin)


def test_last_step_contracts():
    for schedule in SCHEDULES:
        assert schedule.endswith("n")
        assert coefficients(schedule)[-1] == coefficients(schedule, True)[-1] == CONTRACTING
    x = apply(CONTRACTING, grid(0, 2))
    assert x.abs().max() <= 1
