"""`convert` on input that is unusual or wrong: the right answer, or an error that says what."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lipfast
from lipfast import nn as lnn


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lipfast.convert(*args, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "methods", "reason"),
    [
        ({"kernel_size": 2, "stride": 2}, ("aol", "lot"), "kernel_size: .* odd sizes"),
        ({"kernel_size": 3}, ("lot", "soc"), "padding: .* keeps the size of the map"),
        ({"kernel_size": 3, "padding": 1, "groups": 2}, ("cpl",), "groups: .* expected 1, got 2"),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, ("bcop",), "dilation: .* expected 1"),
        ({"kernel_size": (1, 3), "padding": (0, 1)}, ("sll",), "kernel_size: .* square"),
        (
            {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
            ("aol",),
            "padding_mode: .* got 'reflect'",
        ),
    ],
)
def test_what_a_method_cannot_do_is_left_alone_with_the_reason(arguments, methods, reason):
    for method in methods:
        model = nn.Sequential(nn.Conv2d(4, 4, **arguments), nn.Flatten(), nn.LazyLinear(3))
        model(torch.randn(1, 4, 6, 6))
        with pytest.warns(UserWarning, match=f"Conv2d at 0: {reason}"):
            lipfast.convert(model, method)
        assert type(model[0]) is nn.Conv2d
        report = lipfast.convert(model, method, dry_run=True)
        (step,) = report.left_alone
        assert step.factor is None or step.factor > 0
        assert isinstance(model[2], lnn.LipschitzLinear)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": (1, 5), "stride": (1, 2)},
        {"kernel_size": 3, "padding": "valid", "bias": False},
    ],
)
def test_aol_keeps_the_geometry_of_a_convolution(arguments):
    conv = nn.Conv2d(4, 6, **arguments)
    x = torch.randn(2, 4, 9, 9)
    shape = conv(x).shape
    lipfast.convert(conv)
    assert isinstance(conv, lnn.AOLConv2d)
    assert conv(x).shape == shape
    assert conv.lipschitz_bound() <= 1 + 1e-6


def test_cayley_pads_circularly_and_says_so():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    (step,) = lipfast.convert(conv, "cayley", dry_run=True).converted
    assert step.outcome == "CayleyConv2d, fresh weights, circular padding"
    assert lipfast.convert(conv, "cayley").padding_mode == "circular"


def test_a_stride_becomes_more_channels():
    conv = nn.Conv2d(3, 8, 7, 2, 3)
    x = torch.randn(2, 3, 8, 8)
    shape = conv(x).shape
    lipfast.convert(conv, "lot")
    assert conv.weight.shape == (8, 12, 7, 7)
    assert conv(x).shape == shape


def test_shared_modules_are_converted_once_and_named_twice():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    (step,) = lipfast.convert(model, "cpl", dry_run=True).converted
    assert step.paths == ("0", "2")
    lipfast.convert(model, "cpl")
    assert model[0] is model[2] is shared
    assert type(shared) is lnn.CPLLinear


@pytest.mark.parametrize("method", list(lnn.METHODS))
def test_tied_weights_stay_tied(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    lipfast.convert(model, method)
    assert model[2].weight is model[0].weight
    assert model[1].weight is not model[0].weight
    assert all(type(m) is lnn.METHODS[method].linear for m in model)
    model(torch.randn(2, 4)).sum().backward()
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})


def test_a_tie_with_another_kind_of_layer_is_kept_or_named():
    def tied():
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(5, 2))
        model[1].weight = model[0].weight
        return model

    model = quietly(tied(), "aol")
    assert model[1].weight is model[0].weight
    assert isinstance(model[1], lnn.AOLLinear)
    model = tied()
    with pytest.warns(UserWarning, match=r"Linear at 1: it shares a parameter with 0\.weight"):
        lipfast.convert(model, "sll")
    assert model[1].weight is model[0].weight
    assert [type(m) for m in model] == [nn.Embedding, nn.Linear, lnn.SLLLinear]


def test_converting_again_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    lipfast.convert(model)
    state = copy.deepcopy(model.state_dict())
    report = lipfast.convert(model, "lot", dry_run=True)
    assert [s.status for s in report.steps] == ["lipfast", "fine", "fine", "lipfast"]
    assert report.bound <= 1 + 1e-6
    lipfast.convert(model, "lot")
    assert type(model[0]) is lnn.AOLConv2d
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_network_on_the_meta_device_stays_there():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten())
    for method in ("aol", "cpl"):
        new = quietly(copy.deepcopy(model), method)
        assert all(p.is_meta for p in new.parameters())
        report = lipfast.convert(new, method, dry_run=True)
        assert (report.bound, report.bound_note) == (None, "its parameters are on the meta device")
        real = new.to_empty(device="cpu")
        real[0].reset_parameters()
        assert real(torch.randn(2, 4, 4, 4)).isfinite().any()


@pytest.mark.slow
def test_a_compiled_network_compiles_again():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = torch.compile(model)
    x = torch.randn(3, 4)
    compiled(x)
    assert lipfast.convert(compiled, "aol", dry_run=True).bound is not None
    assert lipfast.convert(compiled, "aol") is compiled
    assert type(model[0]) is lnn.AOLLinear
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("model", "keywords", "error", "message"),
    [
        (nn.ReLU(), {}, ValueError, "with an nn.Conv2d or nn.Linear .* got none in ReLU"),
        (nn.Sequential(nn.LSTM(2, 2)), {}, ValueError, "got none in Sequential"),
        (nn.Conv2d(2, 2, 2), {}, ValueError, r"got none in Conv2d \(kernel_size: AOLConv2d"),
        (nn.Linear(2, 2), {"method": "eco"}, ValueError, "method: expected one of aol, bcop"),
        (nn.Linear(2, 2), {"activation": "relu"}, ValueError, "activation: .*'maxmin' or None"),
        (
            nn.Sequential(nn.LazyLinear(3)),
            {},
            ValueError,
            r"a lazy one at 0\.weight; run the network once",
        ),
        ("net", {}, TypeError, "model: convert expected a torch.nn.Module, got str"),
    ],
)
def test_wrong_input_is_named(model, keywords, error, message):
    with pytest.raises(error, match=message):
        lipfast.convert(model, **keywords)


def test_parametrised_layers_are_left_alone():
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        nn.Linear(3, 3),
    )
    with pytest.warns(UserWarning, match="its weight is parametrised; remove_parametrizations"):
        lipfast.convert(model)
    assert type(model[2]) is lnn.AOLLinear
    assert len(lipfast.convert(model, dry_run=True).left_alone) == 2


def test_subclasses_are_converted_unless_they_would_lose_methods():
    class Scaled(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 1)

    class Doubled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return 2 * super()._conv_forward(x, weight, bias)

    class Helped(nn.Linear):
        def help(self):
            return 1

    model = nn.Sequential(Scaled(3), Doubled(3, 3, 1), nn.Flatten(), Helped(12, 12))
    with pytest.warns(UserWarning, match="Helped at 3: its class defines help, which would"):
        lipfast.convert(model)
    assert [type(m).__name__ for m in model] == ["AOLConv2d", "Doubled", "Flatten", "Helped"]
    report = lipfast.convert(model, dry_run=True, example=torch.randn(1, 3, 2, 2))
    assert "conv2d" in {step.kind for step in report.breaking}
    assert report.bound is None


def test_a_wrong_example_leaves_the_bound_open():
    model = nn.Sequential(nn.Linear(4, 4))
    report = lipfast.convert(model, dry_run=True, example=torch.randn(2, 5))
    assert report.bound is None
    assert "5" in report.bound_note


@pytest.mark.timeout(60)
def test_large_layers_that_keep_their_weights_are_not_initialised():
    model = nn.Sequential(nn.Linear(4096, 8000), nn.Linear(8000, 16))
    weights = [layer.weight for layer in model]
    lipfast.convert(model)
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))


def test_a_forward_pass_that_cannot_be_traced_is_said():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x) if x.mean() > 0 else x

    report = lipfast.convert(Branching(), dry_run=True, example=torch.randn(1, 2))
    assert [s.status for s in report.steps] == ["converted", "unknown"]
    assert "torch.fx could not trace" in report.steps[1].outcome
    assert report.bound is None
