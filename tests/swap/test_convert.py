"""`convert`: plain networks become 1-Lipschitz ones, and the report says what else breaks that."""

import copy
import logging
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lipfast
from lipfast import nn as lnn


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride, average):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Conv2d(c_in, c_out, 1, stride) if stride > 1 else nn.Identity()
        self.weight = 0.5 if average else 1

    def forward(self, x):
        y = self.conv2(self.relu(self.conv1(x)))
        return self.relu(self.weight * y + self.weight * self.short(x))


class ResNet(nn.Module):
    def __init__(self, average):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 4, 1, average), Block(4, 8, 2, average))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


def vgg():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, padding=1), nn.LeakyReLU(0.1), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 5)),
    )


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 5))


# what the network is bounded by when each layer is 1-Lipschitz
NETWORKS = {
    "vgg": (vgg, 1.13 / 2),
    "resnet": (lambda: ResNet(average=False), 4 / 4),
    "averaging resnet": (lambda: ResNet(average=True), 1 / 4),
    "mlp": (mlp, 1),
}


def quietly(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lipfast.convert(model, *args, **kwargs)


@pytest.mark.parametrize("method", list(lnn.METHODS))
@pytest.mark.parametrize("network", NETWORKS)
def test_the_converted_network_respects_the_reported_bound(network, method):
    torch.manual_seed(0)
    make, expected = NETWORKS[network]
    model = make().double()
    names = [name for name, _ in model.named_modules()]
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert quietly(model, method) is model
    report = lipfast.convert(model, method, dry_run=True, example=x)
    assert report.bound == pytest.approx(expected, rel=1e-3)
    assert [name for name, _ in model.named_modules()] == names
    assert not report.converted + report.left_alone
    kinds = (lnn.METHODS[method].conv, lnn.METHODS[method].linear)
    layers = [m for m in model.modules() if isinstance(m, lnn.LipschitzModule)]
    assert layers
    assert all(isinstance(layer, kinds) for layer in layers)
    model.eval()
    jacobian = torch.autograd.functional.jacobian(lambda z: model(z[None])[0], x[0])
    assert float(torch.linalg.matrix_norm(jacobian.flatten(1), 2)) <= report.bound * (1 + 1e-9)
    steps = 10.0 ** torch.linspace(-6, 1, 8, dtype=torch.float64)
    moved = x[:1] + steps[:, None, None, None] * torch.randn(8, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        gaps = (model(moved) - model(x[:1])).norm(dim=1)
    assert bool((gaps <= report.bound * (moved - x[:1]).flatten(1).norm(dim=1)).all())
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("method", "near"), [("aol", True), ("lot", True), ("cayley", False)])
def test_layers_that_are_near_keep_their_parameters(method, near):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 5))
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    assert "its weights" in str(lipfast.convert(model, "lot", dry_run=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quietly(model, method)
    for name, (parameter, value) in before.items():
        kept = model.get_parameter(name)
        assert (kept is parameter) == near
        assert torch.equal(kept, value) == near
    if near:
        model(torch.randn(2, 4, 4, 4)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].weight, before["0.weight"][1])


def test_an_orthogonal_layer_stays_what_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    for layer in (model[0], model[2]):
        nn.init.orthogonal_(layer.weight)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = model(x)
    for method in ("lot", "bcop"):
        converted = lipfast.convert(copy.deepcopy(model), method)
        torch.testing.assert_close(converted(x), y)


def test_everything_around_the_weights_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    model[0].eval()
    calls = []
    model[1].register_forward_hook(lambda *args: calls.append(1))
    inside = model[0]
    for method in ("aol", "sll"):
        new = quietly(copy.deepcopy(model), method)
        assert [m.training for m in new] == [False, True]
        assert new[0].bias is None
        assert all(not p.requires_grad for p in new[0].parameters())
        assert all(p.requires_grad for p in new[1].parameters())
        assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
        new(torch.randn(2, 4, dtype=torch.bfloat16))
        assert len(calls) == 1
        calls.clear()
    lipfast.convert(model)
    assert model[0] is inside
    assert isinstance(inside, lnn.AOLLinear)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())


def test_the_network_itself_may_be_a_layer():
    linear = nn.Linear(3, 2)
    assert lipfast.convert(linear, "cpl") is linear
    assert type(linear) is lnn.CPLLinear
    assert linear(torch.randn(4, 3)).shape == (4, 2)


def test_a_dry_run_changes_nothing_and_says_the_same():
    torch.manual_seed(0)
    model = ResNet(average=False)
    kinds = [type(m) for m in model.modules()]
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    report = lipfast.convert(model, "lot", dry_run=True)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), y)
    assert [s.paths[0] for s in report.converted] == [
        *("stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2"),
        *("blocks.1.short", "fc"),
    ]
    assert report.converted[0].outcome == "LOTConv2d, its weights"
    assert report.converted[3].outcome == "LOTConv2d, fresh weights"
    assert [(s.paths, s.kind, s.factor) for s in report.breaking] == [
        (("blocks.0",), "add", 2.0),
        (("blocks.1",), "add", 2.0),
    ]
    assert report.bound is None
    assert "give an example input" in report.bound_note
    lines = str(report).splitlines()
    assert any("blocks.1" in line and "0.5 * x + 0.5 * f(x)" in line for line in lines)
    assert "7 converted, 2 breaks, 4 fine; no bound" in lines[-1]


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.even = nn.Conv2d(3, 3, 2, 2)
        self.up = nn.ConvTranspose2d(3, 3, 2, 2)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.act = nn.PReLU()
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x):
        y = self.up(self.even(self.conv(self.norm(x))))
        y = torch.cat([self.act(self.pool(y)), x], 1)
        y = self.drop(F.gelu(y)) * torch.sigmoid(y)
        z = y.flatten(2).transpose(1, 2)[:, :, :3]
        return self.attention(z, z, z)[0] + torch.exp(z)


def test_the_report_names_what_breaks_the_bound():
    report = lipfast.convert(Everything().train(), dry_run=True)
    found = {step.paths[0] or step.kind: step for step in report.steps}
    statuses = {name: step.status for name, step in found.items()}
    assert statuses == {
        **dict.fromkeys(("norm", "pool", "drop", "attention"), "breaks"),
        **dict.fromkeys(("cat", "gelu", "mul", "add"), "breaks"),
        **dict.fromkeys(("up", "exp"), "unknown"),
        **{"conv": "converted", "even": "left alone", "act": "fine"},
    }
    assert found["pool"].factor == 3
    assert found["cat"].factor == pytest.approx(math.sqrt(2))
    assert found["gelu"].factor == 1.13
    assert found["attention"].factor == found["mul"].factor == math.inf
    assert "odd sizes >= 1, got (2, 2)" in found["even"].outcome
    assert "1 / (1 - p) = 2 in training" in found["drop"].outcome
    assert report.bound is None


def test_the_insides_of_attention_are_not_converted():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 1, 8, 0.0))
    quietly(model)
    assert isinstance(model[0], lnn.AOLLinear)
    assert not any(isinstance(m, lnn.LipschitzModule) for m in model[1].modules())


def test_a_conversion_warns_and_logs_what_is_left(caplog):
    model = nn.Sequential(nn.Linear(4, 4), *[nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
    with (
        caplog.at_level(logging.INFO, "lipfast"),
        pytest.warns(UserWarning, match=r"BatchNorm1d at 1 and 1 more: in training .*remove it"),
    ):
        lipfast.convert(model)
    assert "AOLLinear, its weights" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lipfast.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_activations_become_maxmin_on_demand():
    model = lipfast.convert(
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.PReLU(4), nn.Tanh(), nn.ReLU()), activation="maxmin"
    )
    assert [type(m) for m in model[1:]] == [lnn.MaxMin, nn.Tanh, lnn.MaxMin]
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(model[1](x), lnn.MaxMin()(x))


def test_options_reach_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(12, 2))
    quietly(model, "lot", ridge=1e-4)
    assert model[0].ridge == model[2].ridge == 1e-4
    with pytest.raises(TypeError, match="layer_options: AOLConv2d takes bias, padding_mode, got"):
        lipfast.convert(nn.Linear(2, 2), "aol", ridge=1e-4)


def test_a_dry_run_steps_no_normalisation_of_weights():
    normalised = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    model = nn.Sequential(nn.Linear(6, 6), normalised).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lipfast.convert(model, dry_run=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.training
    assert normalised.training
