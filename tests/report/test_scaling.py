"""Growth of time and memory: what is measured, what is computed, and the files."""

import json
import math
from dataclasses import replace

import pytest

from lipfast.report import scaling as module
from lipfast.report.cost_model import training_cost
from lipfast.report.scaling import Scaling, fitted_exponent, measure_scaling
from lipfast.report.scaling_report import scaling_table, write_scaling
from lipfast.saved import saved_bytes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Times are those of the formula at 1e9 multiply-adds per second; returns what was timed."""
    timed: list[tuple[str, int, int]] = []

    def seconds(method: str, channels: int, side: int, batch: int, device: str) -> float:
        timed.append((method, channels, side))
        return training_cost(method, channels, side, batch).total / 1e9

    monkeypatch.setattr(module, "_step_seconds", seconds)
    return timed


def small(**changes) -> Scaling:
    options = {"channels": (8, 16, 32), "sides": (4, 8), "batch": 2, "seconds_per_step": 0.01}
    return measure_scaling(["aol", "lot", "conv"], **{**options, **changes})


def test_sizes_beyond_the_limit_are_computed_from_the_last_measured_one(clock):
    found = small(channels=(8, 16, 1024, 32))
    curve = found.curve("aol", "channels")
    assert [p.channels for p in curve] == [8, 16, 32, 1024]
    assert [p.measured for p in curve] == [True, True, True, False]
    assert ("aol", 1024, 8) not in clock
    expected = training_cost("aol", 1024, 8, 2).total / 1e9
    assert curve[-1].seconds == pytest.approx(expected)


def test_a_curve_is_not_taken_up_again_once_it_has_left_the_limit(clock, monkeypatch):
    first = {(8, 8), (32, 4)}
    monkeypatch.setattr(
        module, "_step_seconds", lambda m, c, s, *_: 1.0 if (c, s) in first else None
    )
    found = small()
    assert [p.measured for p in found.curve("aol", "channels")] == [True, False, False]


def test_saved_bytes_are_those_of_the_layer(clock):
    import torch

    from lipfast.nn import LOTConv2d

    layer = LOTConv2d(16, 16, 3)
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    point = small().curve("lot", "channels")[1]
    assert (point.channels, point.side) == (16, 8)
    assert point.saved_bytes == saved_bytes(lambda: layer(x), *layer.parameters())


def test_a_plain_convolution_keeps_its_input(clock):
    point = small().curve("conv", "side")[1]
    assert point.saved_bytes == 4 * 2 * 32 * 8 * 8


def test_exponent_of_a_power_law():
    point = small(channels=(8,), sides=(4,)).points[0]
    curve = [
        replace(point, channels=c, seconds=3 * c**2.5, saved_bytes=c**2, measured=c < 100)
        for c in (8, 16, 32, 64, 128)
    ]
    assert fitted_exponent(curve, "channels", "seconds") == pytest.approx(2.5)
    assert fitted_exponent(curve, "channels", "saved_bytes") == pytest.approx(2)
    assert fitted_exponent(curve[:1], "channels", "seconds") is None


def test_files_tell_measured_from_computed(clock, tmp_path):
    found = small(channels=(8, 512))
    names = [path.name for path in write_scaling(found, tmp_path)]
    expected = ["scaling.json", "scaling.csv", "scaling.md", "scaling.png", "scaling.svg"]
    assert names == expected
    assert all((tmp_path / name).stat().st_size for name in names)
    points = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert {p["measured"] for p in points} == {True, False}
    rows = [line for line in scaling_table(found).splitlines() if line.startswith("| AOL")]
    assert rows[1].endswith(") |")
    assert "(" not in rows[1].split("|")[2]
    svg = (tmp_path / "scaling.svg").read_text()
    assert "nn.Conv2d" in svg
    assert "computed" in svg


def test_real_steps_take_time():
    found = measure_scaling(["conv"], channels=(4,), sides=(4,), batch=1)
    assert all(p.measured and 0 < p.seconds < math.inf for p in found.points)


@pytest.mark.parametrize(
    ("changes", "name"), [({"seconds_per_step": 0}, "seconds_per_step"), ({"batch": 0}, "batch")]
)
def test_bad_arguments(changes, name):
    with pytest.raises(ValueError, match=name):
        small(**changes)
    with pytest.raises(ValueError, match="method"):
        measure_scaling(["eco"])
