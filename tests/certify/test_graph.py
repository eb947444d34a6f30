"""Bounds of networks with any forward pass, along their traced graph."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import certify
from lipfast import nn as lnn


class Net(nn.Module):
    """A forward pass from a function, over a few layers."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv = lnn.AOLConv2d(3, 3, 3)
        self.linear = nn.Linear(3, 3)
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.tensor([0.5, -2.0, 1.0])[:, None, None])
        with torch.no_grad():
            self.conv.weight.normal_()

    def forward(self, x):
        return self.function(self, x)


def fire(m, x):
    return torch.cat([m.conv(x), 0.5 * x, x.chunk(3, 1)[0]], dim=1)


def head(m, x):
    x = F.max_pool2d(F.leaky_relu(x, 0.1), 2)
    return m.linear(x.mean((2, 3)).flatten(1))


CASES = {
    "residual": (lambda m, x: x + m.conv(x), 2),
    "average": (lambda m, x: 0.5 * x + m.conv(x) / 2, 1),
    "difference": (lambda m, x: torch.sub(m.conv(x), x), 2),
    "two inputs joined": (lambda m, x: torch.cat([x, m.conv(x)], 1), math.sqrt(2)),
    "parts": (fire, 1.5),
    "scaled by a parameter": (lambda m, x: m.scale * m.conv(x) + m.scale, 2),
    "in place": (lambda m, x: m.relu(m.conv(x)) + m.relu(x.clone()), 2),
    "broadcast mean": (lambda m, x: x + x.mean((2, 3), keepdim=True), 2),
    "broadcast sum": (lambda m, x: x.sum(1, keepdim=True) - x, 1 + 3),
    "sizes": (lambda m, x: (x.view(x.size(0), -1) * x.shape[1]).reshape(x.shape), 3),
    "pooling to a part": (lambda m, x: F.adaptive_avg_pool2d(x, 2), 1 / 2),
    "expanded": (lambda m, x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1), 1),
    "dropout": (lambda m, x: F.dropout(x, 0.5, m.training), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_that_of_the_graph_and_above_the_jacobian(name):
    torch.manual_seed(0)
    function, expected = CASES[name]
    net = Net(function).double().train()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    bound = certify.lipschitz_bound(net, x)
    assert net.training
    assert net.conv.training
    layer = net.eval().conv.lipschitz_bound()
    assert bound <= expected * 1.0000001
    assert bound >= expected * layer * 0.999 - 1e-3
    jacobian = torch.autograd.functional.jacobian(net, x).reshape(-1, x.numel())
    assert float(torch.linalg.matrix_norm(jacobian, 2)) <= bound * (1 + 1e-9)


def test_a_whole_network_with_pooling_and_a_plain_head():
    torch.manual_seed(0)
    net = Net(head).double().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    bound = certify.lipschitz_bound(net, x)
    norm = float(torch.linalg.matrix_norm(net.linear.weight.detach(), 2))
    # mean over 16 positions: 1/4
    assert norm / 4 <= bound <= norm / 4 * 1.002


REFUSED = {
    "product of two signals": lambda m, x: x * torch.sigmoid(x),
    "quotient of two signals": lambda m, x: x / (x + 3),
    "bound is not known": lambda m, x: torch.exp(x),
    "takes numbers from a signal": lambda m, x: x * x.sum().item(),
    "could not trace": lambda m, x: x if x.sum() > 0 else -x,
    "on in evaluation mode": lambda m, x: F.dropout(x, 0.5),
    "where": lambda m, x: torch.where(x > 0, x, x),
    "computes something else": lambda m, x: torch.rand(()) * x,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_known_bound_is_refused_with_the_reason(reason):
    message = "is not known" if reason == "where" else reason
    with pytest.raises(TypeError, match=message):
        certify.lipschitz_bound(Net(REFUSED[reason]), torch.randn(2, 3, 4, 4))


def test_without_an_example_the_error_asks_for_one():
    with pytest.raises(TypeError, match=r"Net at 'the top'.*give an example"):
        certify.lipschitz_bound(Net(fire))


def test_the_example_is_not_written():
    net = Net(lambda m, x: m.relu(x[:, :2]).sum(1, keepdim=True) + x)
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    # the addition sees x after its first two channels were changed
    assert certify.lipschitz_bound(net, x) == pytest.approx(math.sqrt(2) * math.sqrt(3) + 1)
    assert torch.equal(x, before)


def test_hooks_on_a_layer_are_refused():
    net = Net(fire)
    net.conv.register_forward_hook(lambda module, args, output: 3 * output)
    with pytest.raises(TypeError, match=r"without forward hooks.*AOLConv2d at 'conv'"):
        certify.lipschitz_bound(net, torch.randn(1, 3, 4, 4))


def test_two_inputs_are_refused():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(TypeError, match="a network of one input, got x, y"):
        certify.lipschitz_bound(Two(), torch.randn(1, 3))


def test_report_certifies_a_network_with_residuals():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.conv(x).mean((2, 3)) + x.mean((2, 3)))
    x, y = torch.randn(40, 3, 4, 4), torch.randint(3, (40,))
    result = certify.report(model, [(x[:20], y[:20]), (x[20:], y[20:])], radii=(0.0, 0.1))
    assert result.lipschitz_bound == pytest.approx(certify.lipschitz_bound(model, x))
    assert result.lipschitz_bound <= 0.5001
    with torch.no_grad():
        scores = model.eval()(x)
    radius = certify.certified_radius(scores, y, lipschitz=result.lipschitz_bound)
    assert result.certified[0.1] == certify.certified_robust_accuracy(radius, 0.1)
