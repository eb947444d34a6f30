"""The formulas agree with the products that a training step really makes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lipfast.nn import METHODS
from lipfast.report.cost_model import training_cost


def counted(method: str, channels: int, side: int, batch: int, kernel_size: int) -> float:
    torch.manual_seed(0)
    layer = METHODS[method].conv(channels, channels, kernel_size)
    x = torch.randn(batch, channels, side, side, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize(("channels", "side", "batch"), [(32, 8, 8), (48, 6, 16)])
@pytest.mark.parametrize("method", ["bcop", "lot", "soc"])
def test_totals_are_what_torch_counts(method, channels, side, batch, kernel_size):
    expected = counted(method, channels, side, batch, kernel_size)
    found = training_cost(method, channels, side, batch, kernel_size).total
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("method", ["aol", "sll", "cpl"])
def test_the_work_on_the_maps_is_what_torch_counts(method):
    """Their weights are built by compiled code, which torch does not count."""
    expected = counted(method, 8, 16, 64, 3)
    found = training_cost(method, 8, 16, 64, 3)
    assert found.maps == pytest.approx(expected, rel=0.05)
    assert found.weights < 0.05 * found.maps


def test_gram_bound_counts_each_pair_of_taps_once():
    assert training_cost("aol", 10, 1, 1, 3).weights == 135 * 10**3
    assert training_cost("sll", 10, 1, 1, 1).weights == 3 * 10**3


def test_growth_with_channels_and_maps():
    ratio = training_cost("lot", 64, 8, 1).weights / training_cost("lot", 32, 8, 1).weights
    assert ratio == 8
    ratio = training_cost("conv", 64, 16, 1).total / training_cost("conv", 64, 8, 1).total
    assert ratio == 4


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("eco", 1, 1, 1), "method"), (("aol", 0, 1, 1), "channels"), (("aol", 1, 1, 0), "batch")],
)
def test_bad_arguments(arguments, name):
    with pytest.raises(ValueError, match=name):
        training_cost(*arguments)
