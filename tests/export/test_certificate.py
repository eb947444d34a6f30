"""What the certificate of a plain network claims, and what it does not."""

import json
import math

import pytest
import torch
from torch import nn

import lipfast
from lipfast import nn as lnn
from lipfast.certify import certified_radius, lipschitz_bound, lipschitz_bounds, margin
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_bounds_are_those_of_the_network_in_evaluation(method):
    torch.manual_seed(0)
    net = ConvNet(method, width=8, input_size=(3, 8, 8), layers_per_block=1)
    certificate = lipfast.to_plain(net).certificate
    net.eval()(torch.zeros(1, 3, 8, 8))
    assert certificate["lipschitz_bound"] == lipschitz_bound(net)
    assert certificate["layer_bounds"] == lipschitz_bounds(net)
    assert certificate["reason"] is None
    assert certificate["norm"] == "l2"
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate


def test_its_formula_is_the_certified_radius():
    plain = lipfast.to_plain(nn.Sequential(lnn.AOLLinear(6, 6), nn.Linear(6, 4)), (6,))
    scores, labels = plain(torch.randn(50, 6)), torch.randint(4, (50,))
    bound = plain.certificate["lipschitz_bound"]
    formula = plain.certificate["radius"].split(",")[0]
    margins = margin(scores, labels)
    names = {"margin": margins, "sqrt": math.sqrt, "lipschitz_bound": bound}
    radius = eval(formula, {"__builtins__": {}}, names)
    expected = certified_radius(scores, labels, lipschitz=bound)
    torch.testing.assert_close(radius.clamp_min(0), expected)


class Square(nn.Module):
    def forward(self, x):
        return x * x


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        (Square(), "mul"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "Conv2d"),
    ],
)
def test_nothing_is_claimed_with_a_layer_of_unknown_bound(inside, reason):
    model = nn.Sequential(lnn.AOLConv2d(4, 4, 3), inside)
    certificate = lipfast.to_plain(model, (4, 6, 6)).certificate
    assert certificate["lipschitz_bound"] is None
    assert reason in certificate["reason"]
    assert certificate["layer_bounds"]["0"] <= 1 + 1e-6
    assert "example input" in lipfast.to_plain(model).certificate["reason"]


def test_batch_norm_counts_as_the_map_that_it_is_in_evaluation():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    torch.nn.init.constant_(norm.weight, 5.0)
    norm.running_var.fill_(0.25)
    model = nn.Sequential(lnn.BCOPConv2d(4, 4, 3), norm)
    plain = lipfast.to_plain(model, (4, 4, 4))
    x = torch.randn(1, 4, 4, 4)
    jacobian = torch.autograd.functional.jacobian(plain, x).reshape(64, 64)
    norm = float(torch.linalg.matrix_norm(jacobian, 2))
    assert 9.99 < norm <= plain.certificate["lipschitz_bound"] * (1 + 1e-5)


def test_nothing_is_claimed_where_hooks_may_change_outputs():
    model = nn.Sequential(lnn.AOLConv2d(4, 4, 3), lnn.MaxMin()).eval()
    model[0].register_forward_hook(lambda module, args, y: 3 * y)
    plain = lipfast.to_plain(model, (4, 6, 6))
    assert plain.certificate["lipschitz_bound"] is None
    assert "hooks" in plain.certificate["reason"]
    x = torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(plain(x), model(x))


def test_nothing_is_claimed_in_half_precision_and_without_a_finite_bound():
    half = lnn.AOLLinear(4, 4).bfloat16()
    assert "bfloat16" in lipfast.to_plain(half).certificate["reason"]

    layer = lnn.AOLLinear(4, 4)
    layer.lipschitz_bound = lambda: math.inf
    certificate = lipfast.to_plain(nn.Sequential(layer), (4,)).certificate
    assert certificate["lipschitz_bound"] is None
    assert certificate["reason"]
    assert certificate["layer_bounds"] == {"0": None}


class Normalize(nn.Module):
    def __init__(self, mean, std) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x):
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std

    def lipschitz_bound(self) -> float:
        return 1 / min(self.std)


def test_the_input_normalisation_is_recorded():
    model = nn.Sequential(Normalize([0.5, 0.25], [0.5, 0.125]), lnn.SLLConv2d(2, 2, 3))
    certificate = lipfast.to_plain(model, (2, 4, 4)).certificate
    assert certificate["input_normalisation"] == {
        "module": "0",
        "mean": [0.5, 0.25],
        "std": [0.5, 0.125],
    }
    assert 8 <= certificate["lipschitz_bound"] <= 8 * (1 + 1e-6)


def test_the_plain_network_obeys_its_bound():
    """The largest singular value of the Jacobian at some inputs, in float64."""
    for method in METHODS:
        torch.manual_seed(0)
        net = ConvNet(
            method, width=4, input_size=(3, 4, 4), layers_per_block=1, dtype=torch.float64
        )
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        plain = lipfast.to_plain(net)
        x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(plain, x).reshape(10, -1)
        norm = float(torch.linalg.matrix_norm(jacobian, 2))
        assert 0.01 < norm <= plain.certificate["lipschitz_bound"]
