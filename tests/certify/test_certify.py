"""Certificates: radii, ties, heads, network bounds, reports."""

import itertools
import math

import pytest
import torch
from torch import nn

import lipfast
from lipfast import certify
from lipfast import nn as lnn
from lipfast.models import ConvNet


def test_margin_and_radius_of_known_scores():
    scores = torch.tensor([[3.0, 1.0, 0.5], [0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    labels = torch.tensor([0, 1, 2])
    torch.testing.assert_close(
        certify.margin(scores, labels), torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64)
    )
    radius = certify.certified_radius(scores, labels)
    torch.testing.assert_close(radius, torch.tensor([math.sqrt(2), 0, 0], dtype=torch.float64))
    half = certify.certified_radius(scores, labels, lipschitz=2.0)
    torch.testing.assert_close(half, radius / 2)


def test_ties_and_the_exact_radius_are_never_certified():
    scores, labels = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0])
    radius = certify.certified_radius(scores, labels)
    assert certify.certified_robust_accuracy(radius, 0.0) == 0.5
    assert certify.certified_robust_accuracy(radius, float(radius[1])) == 0.0
    broken = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, -math.inf]])
    assert certify.certified_radius(broken, torch.zeros(3).long()).tolist() == [0, 0, 0]


def test_pairwise_head_is_exact_and_never_below_the_norm_bound():
    torch.manual_seed(0)
    head = nn.Linear(6, 4, dtype=torch.float64)
    x = torch.randn(50, 6, dtype=torch.float64)
    scores = head(x).detach()
    labels = scores.argmax(1)
    radius = certify.certified_radius(scores, labels, head_weight=head.weight.detach())
    norm = float(torch.linalg.matrix_norm(head.weight.detach(), 2))
    assert (radius >= certify.certified_radius(scores, labels, lipschitz=norm) - 1e-12).all()
    # the nearest boundary point is on the line along w_y - w_j, at exactly this distance
    for i in range(50):
        y = int(labels[i])
        steps = []
        for j in set(range(4)) - {y}:
            direction = head.weight.detach()[y] - head.weight.detach()[j]
            gap = scores[i, y] - scores[i, j]
            steps.append(float(gap / direction.norm()))
        assert float(radius[i]) == pytest.approx(min(steps))


def test_equal_rows_of_a_head_never_divide_by_zero():
    weight = torch.ones(3, 2)
    scores, labels = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 0.0]]), torch.tensor([0, 0])
    radius = certify.certified_radius(scores, labels, head_weight=weight)
    assert radius.tolist() == [math.inf, 0.0]


@pytest.mark.parametrize(
    ("scores", "labels", "error", "message"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.long), ValueError, "scores: expected"),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), ValueError, "scores: expected"),
        (torch.zeros(2, 3, dtype=torch.int), torch.zeros(2).long(), TypeError, "scores: expected"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), ValueError, "labels: expected"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "labels: expected an integer"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), ValueError, r"labels: expected.*\[0, 3\), got"),
    ],
)
def test_bad_scores_and_labels_are_named(scores, labels, error, message):
    with pytest.raises(error, match=message):
        certify.certified_radius(scores, labels)


def test_bad_constants_are_named():
    scores, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    for lipschitz in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lipschitz: expected a positive number"):
            certify.certified_radius(scores, labels, lipschitz=lipschitz)
    with pytest.raises(ValueError, match=r"head_weight: expected \(2, d\)"):
        certify.certified_radius(scores, labels, head_weight=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="head_weight: expected finite"):
        certify.certified_radius(scores, labels, head_weight=torch.full((2, 4), math.nan))
    with pytest.raises(ValueError, match="eps: expected a number >= 0"):
        certify.certified_robust_accuracy(torch.zeros(3), -0.1)
    with pytest.raises(ValueError, match="radius: expected"):
        certify.certified_robust_accuracy(torch.zeros(0), 0.1)


def test_network_bound_is_the_product_over_nested_chains():
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    conv = nn.Conv2d(2, 2, 3, padding=1)
    inner = nn.Sequential(lnn.AOLConv2d(2, 2, 3), lnn.MaxMin())
    model = nn.Sequential(inner, conv, nn.ReLU(), nn.Flatten(), linear)
    bounds = certify.lipschitz_bounds(model)
    assert set(bounds) == {"0.0", "1", "4"}
    true = float(torch.linalg.matrix_norm(linear.weight.double(), 2))
    assert true <= bounds["4"] <= 1.002 * true
    product = math.prod(bounds.values())
    assert certify.lipschitz_bound(model) == pytest.approx(product)
    x = torch.randn(1, 2, 2, 2)
    jacobian = torch.autograd.functional.jacobian(model.eval(), x).reshape(8, 8)
    assert float(torch.linalg.matrix_norm(jacobian, 2)) <= product


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.LSTM(2, 2),
        nn.MultiheadAttention(4, 2),
        nn.Hardshrink(),
        nn.AdaptiveAvgPool2d(2),
        nn.LogSoftmax(1),
    ],
)
def test_layers_without_a_known_bound_are_refused_by_name(module):
    model = nn.Sequential(nn.Flatten(), module)
    with pytest.raises(TypeError, match=f"{type(module).__name__} at '1'"):
        certify.lipschitz_bound(model)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("module", [Residual(nn.Identity()), Doubled(2, 2)])
def test_a_subclass_with_another_forward_pass_is_refused(module):
    with pytest.raises(TypeError, match=f"{type(module).__name__} at '0'"):
        certify.lipschitz_bound(nn.Sequential(module))


def test_a_layer_with_hooks_is_refused():
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    handle = model[1].register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(TypeError, match=r"without forward hooks.*Linear at '1'"):
        certify.lipschitz_bound(model)
    handle.remove()
    assert certify.lipschitz_bound(model) > 0


def test_hooks_that_build_weights_are_no_obstacle():
    torch.manual_seed(0)
    net = ConvNet("lot", input_size=(1, 8, 8), width=4, layers_per_block=1)
    data = [(torch.randn(6, 1, 8, 8), torch.randint(10, (6,)))]
    before = certify.report(net, data)
    assert certify.report(lipfast.fuse(net), data) == before


def test_a_module_with_its_own_bound_is_taken_at_its_word():
    class Halved(nn.Module):
        def forward(self, x):
            return x / 2

        def lipschitz_bound(self):
            return 0.5

    assert certify.lipschitz_bound(nn.Sequential(Halved(), lnn.MaxMin(), Halved())) == 0.25


def test_reflect_padding_is_refused():
    with pytest.raises(TypeError, match="known Lipschitz bound"):
        certify.lipschitz_bound(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))


@pytest.mark.parametrize("method", list(lnn.METHODS))
def test_report_certifies_and_restores_the_modes(method):
    torch.manual_seed(0)
    net = ConvNet(method, input_size=(1, 8, 8), width=4, layers_per_block=1)
    net.block1.eval()
    x, y = torch.randn(20, 1, 8, 8), torch.randint(10, (20,))
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    result = certify.report(net, batches, radii=(0.0, 0.1))
    assert net.training
    assert not net.block1.training
    assert result.n_samples == 20
    assert all(bound <= 1 + 1e-6 for bound in result.layer_bounds.values())
    assert len(result.layer_bounds) == 5
    assert result.lipschitz_bound <= 1 + 1e-5
    net.eval()
    with torch.no_grad():
        scores = net(x)
    radius = certify.certified_radius(scores, y, lipschitz=result.lipschitz_bound)
    assert result.accuracy == float((scores.argmax(1) == y).double().mean())
    assert result.certified[0.1] == certify.certified_robust_accuracy(radius, 0.1)
    assert result.certified[0.0] <= result.accuracy


def test_report_uses_the_pairwise_radius_of_a_plain_head():
    torch.manual_seed(0)
    model = nn.Sequential(lnn.AOLLinear(6, 6), lnn.MaxMin(), nn.Linear(6, 3))
    x = torch.randn(200, 6)
    y = model.eval()(x).argmax(1)
    result = certify.report(model, [(x, y)], radii=(0.05,))
    body = certify.lipschitz_bound(model[:2])
    with torch.no_grad():
        exact = certify.certified_radius(model(x), y, lipschitz=body, head_weight=model[2].weight)
        loose = certify.certified_radius(model(x), y, lipschitz=result.lipschitz_bound)
    assert result.certified[0.05] == certify.certified_robust_accuracy(exact, 0.05)
    assert certify.certified_robust_accuracy(loose, 0.05) < result.certified[0.05]


def test_report_refuses_what_it_cannot_certify():
    net = lnn.AOLLinear(4, 3)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        certify.report(net, [])
    bad = [(torch.full((1, 4), math.nan), torch.zeros(1, dtype=torch.long))]
    with pytest.raises(ValueError, match="finite scores"):
        certify.report(net, bad)
    with pytest.raises(TypeError, match="float32 or float64"):
        certify.report(net.bfloat16(), [(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long))])


def test_full_precision_is_set_inside_and_restored():
    def settings():
        return [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]

    torch.set_float32_matmul_precision("medium")
    try:
        before = settings()
        assert before[0] == "medium"
        with torch.autocast("cpu", dtype=torch.bfloat16), certify.full_precision():
            assert settings() == ["highest", False]
            assert not torch.is_autocast_enabled("cpu")
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_activation_variance_never_grows_through_a_sound_network_and_exposes_another():
    torch.manual_seed(0)
    net = ConvNet("bcop", input_size=(1, 8, 8), width=4, layers_per_block=1).eval()
    x = torch.randn(16, 1, 8, 8)
    values = list(certify.batch_activation_variance(net, x).items())
    assert values[0] == (
        "input",
        pytest.approx(float((x - x.mean(0)).double().square().sum() / 16), rel=1e-5),
    )
    assert len(values) == 1 + sum(1 for m in net.modules() if not list(m.children()))
    for (_, before), (_, after) in itertools.pairwise(values):
        assert after <= before * (1 + 1e-5)
    wide = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        wide[0].weight.copy_(2 * torch.eye(4))
    grown = certify.batch_activation_variance(wide, torch.randn(8, 4))
    assert grown["0"] == pytest.approx(4 * grown["input"], rel=1e-5)
    with pytest.raises(ValueError, match="x: expected at least one sample"):
        certify.batch_activation_variance(wide, torch.empty(0, 4))
