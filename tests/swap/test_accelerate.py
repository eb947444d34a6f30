"""What accelerate walks, reports, keeps and refuses."""

import copy
import logging

import pytest
import torch
from swap import published
from torch import nn

import lipfast
from lipfast.nn import AOLConv2d, BCOPConv2d, LipschitzModule
from lipfast.swap import SwapReport


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        published.BCOP(4, 4, 3), published.MaxMin(), nn.Flatten(), nn.Linear(64, 2)
    )


X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def test_dry_run_changes_nothing_and_prints_what_would_change():
    model = make_network()
    model.add_module("slow", published.LOT(4, 4, 3, iter_T=3))
    kinds = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    state = torch.random.get_rng_state()
    report = lipfast.accelerate(model, dry_run=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(report, SwapReport)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert [entry.paths for entry in report.replaced] == [("0",), ("1",)]
    assert [entry.kind for entry in report.unknown] == ["Flatten", "Linear"]
    assert [entry.paths for entry in report.left_alone] == [("slow",)]
    lines = str(report).splitlines()
    assert any("BCOP" in line and "replaced" in line for line in lines)
    assert any("slow" in line and "iter_T is 3, expected 10" in line for line in lines)
    assert lines[-1].startswith("2 replaced, 1 left alone, 0 lipfast, 2 unknown")


def test_modules_stay_the_objects_that_they_are():
    model = make_network()
    layer, order, calls = model[0], list(model.children()), []
    handle = layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    layer.tag = "mine"
    model.eval()
    lipfast.accelerate(model)
    assert list(model.children()) == order
    assert isinstance(layer, BCOPConv2d)
    assert not layer.training
    assert layer.tag == "mine"
    model(X.clone().requires_grad_()).sum().backward()
    model.state_dict()
    assert calls == ["forward", "backward", "state"]
    handle.remove()
    model(X)
    assert calls.count("forward") == 1


def test_a_known_root_is_replaced_in_place():
    layer = published.AOLConv2d(4, 4, 3)
    assert lipfast.accelerate(layer) is layer
    assert isinstance(layer, AOLConv2d)


def test_second_call_changes_nothing():
    model = lipfast.accelerate(make_network())
    kinds = [type(m) for m in model.modules()]
    expected = model(X)
    report = lipfast.accelerate(model, dry_run=True)
    assert not report.replaced
    assert sum(entry.status == "lipfast" for entry in report.entries) == 2
    assert lipfast.accelerate(model) is model
    assert [type(m) for m in model.modules()] == kinds
    torch.testing.assert_close(model(X), expected)


def test_networks_without_known_layers_are_returned_with_a_warning():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="found no layer that it knows"):
        assert lipfast.accelerate(model) is model
    assert [type(m) for m in model] == [nn.Conv2d, nn.ReLU]


def test_shared_modules_and_tied_parameters():
    torch.manual_seed(0)
    shared, tied = published.CPLConv2d(4, 4, 3), published.CPLConv2d(4, 4, 3)
    tied.kernel = shared.kernel
    model = nn.ModuleDict({"a": shared, "b": tied, "c": shared})
    report = lipfast.accelerate(model, dry_run=True)
    assert [entry.paths for entry in report.replaced] == [("a", "c"), ("b",)]
    lipfast.accelerate(model)
    assert model["a"] is model["c"] is shared
    assert model["a"].kernel is model["b"].kernel
    (model["a"](X) + model["b"](X) + model["c"](X)).sum().backward()
    assert float(model["b"].kernel.grad.norm()) > 0
    assert len(list(model.parameters())) == 3


def test_frozen_layers_stay_frozen_and_notice_changes():
    model = make_network()
    model[0].requires_grad_(False)
    lipfast.accelerate(model)
    model(X).sum().backward()
    assert model[0].param_matrices.grad is None
    model.eval()
    before = model(X)
    with torch.no_grad():
        model[0].param_matrices.normal_()
    assert not torch.allclose(model(X), before)


def test_meta_modules_get_their_values_later():
    source = make_network()
    expected = lipfast.accelerate(copy.deepcopy(source)).eval()(X)
    with torch.device("meta"):
        model = make_network()
    lipfast.accelerate(model)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(source.state_dict(), assign=True)
    model[0].polar_residual = torch.zeros(())
    torch.testing.assert_close(model.eval()(X), expected)


@pytest.mark.parametrize("attribute", ["device", "dtype"])
def test_layers_on_two_devices_or_of_two_dtypes_are_left_alone(attribute):
    layer = published.SLLConv2d(4, 4, 3)
    to = {"device": "meta"} if attribute == "device" else {"dtype": torch.float64}
    layer.bias = nn.Parameter(layer.bias.detach().to(**to))
    with pytest.warns(UserWarning, match=f"its parameters differ in {attribute}"):
        lipfast.accelerate(layer)
    assert not isinstance(layer, LipschitzModule)


def test_layers_with_a_forward_of_their_own_are_left_alone():
    model = make_network()
    model[0].forward = lambda x: x
    with pytest.warns(UserWarning, match="0: its forward function was replaced"):
        lipfast.accelerate(model)
    assert not isinstance(model[0], LipschitzModule)


def test_subclasses_are_unknown():
    class Mine(published.BCOP):
        pass

    model = nn.Sequential(Mine(4, 4, 3), published.MaxMin())
    report = lipfast.accelerate(model, dry_run=True)
    assert [entry.kind for entry in report.unknown] == ["Mine"]


def test_compiled_networks_are_changed_inside():
    model = make_network().eval()
    expected = model(X)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(X), expected)
    assert lipfast.accelerate(compiled) is compiled
    assert isinstance(model[0], LipschitzModule)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model[0].param_matrices.normal_()
    assert not torch.allclose(compiled(X), expected, atol=1e-3)
    torch._dynamo.reset()


def test_dtype_converts_the_replaced_layers_in_place():
    model = make_network()
    parameters = list(model.parameters())
    lipfast.accelerate(model, dtype=torch.float64)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert model[0].param_matrices.dtype == torch.float64
    assert model[3].weight.dtype == torch.float32
    assert model[0](X.double()).dtype == torch.float64


def test_log_holds_the_table(caplog):
    with caplog.at_level(logging.INFO, logger="lipfast"):
        lipfast.accelerate(make_network())
    assert "2 replaced" in caplog.text


def test_nan_in_an_adopted_layer_is_named():
    layer = lipfast.accelerate(published.AOLConv2d(4, 4, 3))
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight\.original: expected finite values"):
        layer(X)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": "network"}, TypeError, "model: accelerate expected a torch.nn.Module, got str"),
        ({"exact": "yes"}, TypeError, "exact: accelerate expected a bool, got 'yes'"),
        ({"dtype": torch.int64}, ValueError, "dtype: accelerate expected a floating-point type"),
    ],
)
def test_bad_arguments(arguments, error, match):
    model = make_network()
    with pytest.raises(error, match=match):
        lipfast.accelerate(**{"model": model, **arguments})
    assert type(model[0]) is published.BCOP


def test_a_bound_before_the_first_map_does_not_choose_the_scale_of_a_cayley_layer():
    torch.manual_seed(0)
    source, x = published.spectral.CayleyConv(4, 4, 1).train(), torch.randn(2, 4, 6, 6)
    source(x)
    with torch.no_grad():
        source.weight.mul_(3).add_(0.1 * torch.randn_like(source.weight))
    layer = lipfast.accelerate(published.spectral.CayleyConv(4, 4, 1)).eval()
    layer.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="one forward pass before"):
        layer.lipschitz_bound()
    torch.testing.assert_close(layer(x), source.eval()(x), rtol=1e-4, atol=1e-5)
    assert layer.lipschitz_bound() <= 1 + 1e-6
