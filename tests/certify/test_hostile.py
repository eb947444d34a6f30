"""Networks made to have a bound below their Lipschitz constant."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast import certify
from lipfast import nn as lnn

WIDE = torch.full((10,), -9.0)


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.wide = nn.Parameter(WIDE.clone())
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.function(self, x)


def norm(function, x):
    """Of the Jacobian."""
    rows = torch.autograd.functional.jacobian(function, x).reshape(-1, x.numel())
    return float(torch.linalg.matrix_norm(rows.double(), 2))


def expand_then_scale(net, x):
    y = x.clone()
    z = y.expand(-1, 10)
    y.mul_(5.0)
    return z


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: x.clamp(min=net.wide),
        lambda net, x: torch.clamp(net.wide, min=x),
        lambda net, x: x.view(torch.bfloat16).float(),
        expand_then_scale,
    ],
)
def test_what_repeats_or_reinterprets_entries_is_refused(function):
    with pytest.raises(TypeError, match="known Lipschitz bound"):
        certify.lipschitz_bound(Net(function), torch.randn(1, 1))


@pytest.mark.parametrize("change", [operator.iadd, operator.isub])
def test_what_a_sum_in_place_does_to_other_names(change):
    def forward(net, x):
        y = 1.0 * x
        z = y
        z = change(z, 10 * F.relu(x - 5))  # does nothing to the example
        return y

    net, far = Net(forward), torch.full((1, 4), 9.0)
    bound = certify.lipschitz_bound(net, torch.zeros(1, 4))
    assert norm(net, far) in (pytest.approx(11), pytest.approx(9))
    assert norm(net, far) <= bound * (1 + 1e-6)


def test_what_a_product_in_place_does_to_other_names():
    def forward(net, x):
        y = 1.0 * x
        z = y
        z *= 3.0
        z /= 0.5
        return y

    assert certify.lipschitz_bound(Net(forward), torch.zeros(1, 4)) == pytest.approx(6)


@pytest.mark.parametrize(
    "module",
    [nn.CELU(-1.0), nn.Softplus(threshold=0.0), nn.Softplus(threshold=2.0)],
)
def test_activations_that_expand_without_bound_are_refused(module):
    with pytest.raises(TypeError, match="known Lipschitz bound"):
        certify.lipschitz_bound(module)


def test_batch_norm_without_a_real_spread_is_refused():
    layer = nn.BatchNorm1d(3).eval()
    layer.running_var.fill_(-1.0)
    with pytest.raises(TypeError, match="known Lipschitz bound"):
        certify.lipschitz_bound(layer)


def test_upsampling_in_three_axes():
    module, x = nn.Upsample(scale_factor=2), torch.randn(1, 1, 2, 2, 2)
    for bound in (
        certify.lipschitz_bound(nn.Sequential(module)),
        certify.lipschitz_bound(nn.Sequential(module), x),
    ):
        assert bound >= norm(module, x) * (1 - 1e-6)


def test_upsampling_along_a_graph_counts_the_axes_that_there_are():
    module, x = nn.Upsample(scale_factor=2), torch.randn(1, 1, 2, 2)
    assert certify.lipschitz_bound(nn.Sequential(module), x) == pytest.approx(2)


def test_negative_divisor_of_an_average():
    module = nn.AvgPool2d(2, divisor_override=-1)
    assert certify.lipschitz_bound(module) >= norm(module, torch.randn(1, 1, 4, 4)) * (1 - 1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), lnn.AOLLinear(4, 4), nn.Sequential(nn.ReLU())])
@pytest.mark.parametrize("example", [None, torch.zeros(1, 4)])
def test_forward_functions_that_were_replaced_on_the_object_are_refused(layer, example):
    own = layer.forward
    layer.forward = lambda x: 10 * own(x)
    try:
        # along a graph the forward pass of a container inside is traced
        models = (
            [layer]
            if example is not None and len(list(layer.children()))
            else [layer, nn.Sequential(layer)]
        )
        for model in models:
            with pytest.raises(TypeError, match="replaced on the object"):
                certify.lipschitz_bound(model, example)
    finally:
        del layer.forward


def test_a_forward_function_that_was_put_back_on_the_object_is_no_other():
    layer = nn.Linear(4, 4)
    expected = certify.lipschitz_bound(layer)
    layer.forward = layer.forward
    assert certify.lipschitz_bound(nn.Sequential(layer)) == expected
    other = nn.Linear(4, 4)
    layer.forward = other.forward
    with pytest.raises(TypeError, match="replaced on the object"):
        certify.lipschitz_bound(nn.Sequential(layer))


class Louder(nn.Sequential):
    def forward(self, x):
        return super().forward(10 * x)


def test_report_of_a_sequential_with_its_own_forward_pass():
    torch.manual_seed(0)
    model = Louder(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    x = torch.randn(64, 4)
    y = model(x).argmax(1)
    found = certify.report(model, [(x, y)], radii=(0.05,))
    radius = certify.certified_radius(model(x), y, lipschitz=certify.lipschitz_bound(model, x))
    quiet = nn.Sequential(*model[:-1])
    finer = certify.certified_radius(
        model(x), y, lipschitz=10 * certify.lipschitz_bound(quiet), head_weight=model[2].weight
    )
    allowed = max(certify.certified_robust_accuracy(r, 0.05) for r in (radius, finer))
    assert found.certified[0.05] <= allowed


class LouderLinear(nn.Linear):
    def forward(self, x):
        return 10 * super().forward(x)

    def lipschitz_bound(self):
        return 10 * float(torch.linalg.matrix_norm(self.weight.detach()))


def test_report_of_a_last_layer_with_its_own_forward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), LouderLinear(4, 3)).eval()
    x = torch.randn(64, 4)
    y = model(x).argmax(1)
    found = certify.report(model, [(x, y)], radii=(0.05,))
    radius = certify.certified_radius(model(x), y, lipschitz=certify.lipschitz_bound(model))
    assert found.certified[0.05] == certify.certified_robust_accuracy(radius, 0.05)


def test_report_refuses_samples_of_several_shapes_for_a_bound_of_one():
    model = Net(lambda net, x: net.linear(x.sum((2, 3))))
    y = torch.zeros(2, dtype=torch.long)
    batches = [(torch.randn(2, 4, side, side), y) for side in (2, 8)]
    with pytest.raises(ValueError, match="samples of one shape"):
        certify.report(model, batches)


def test_bounds_are_of_evaluation_mode_and_change_nothing():
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certify.lipschitz_bound(model)
    certify.lipschitz_bounds(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class TimesBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) * x.shape[0]


def test_report_refuses_a_bound_that_grows_with_the_batch():
    batch = (torch.randn(8, 3), torch.zeros(8, dtype=torch.long))
    with pytest.raises(TypeError, match="size of the batch"):
        certify.report(TimesBatch(), [batch])


def test_hooks_of_all_modules_are_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: 3 * y)
    try:
        with pytest.raises(TypeError, match="hooks"):
            certify.lipschitz_bound(model)
    finally:
        handle.remove()
    assert certify.lipschitz_bound(model) > 0


class NeverAsleep(nn.Dropout):
    def train(self, mode: bool = True):
        return super().train(True)


def test_report_refuses_layers_that_stay_in_training_mode():
    model = nn.Sequential(nn.Linear(3, 3), NeverAsleep())
    batch = (torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="evaluation mode"):
        certify.report(model, [batch])


def test_report_looks_at_the_type_of_every_parameter():
    batch = (torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="float16"):
        certify.report(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).half()), [batch])
    with pytest.raises(TypeError, match="parameters"):
        certify.report(nn.Sequential(nn.ReLU()), [batch])
