"""Bad input: the right answer, or an error that says which argument, what for and what came."""

import math
import re

import pytest
import torch
from torch import nn

from lipfast import nn as lnn
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)
LAYERS = [(method, kind) for method in METHODS for kind in ("conv", "linear")]
F64 = torch.float64


def make(method: str, kind: str, *, dtype=None, seed: int = 0) -> lnn.LipschitzModule:
    """4 to 6 channels or features, random parameters."""
    torch.manual_seed(seed)
    if kind == "conv":
        layer = lnn.METHODS[method].conv(4, 6, 3, dtype=dtype)
    else:
        layer = lnn.METHODS[method].linear(4, 6, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape))
    return layer


def example(kind: str, n: int = 2, channels: int = 4, **kwargs) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn((n, channels, 3, 5) if kind == "conv" else (n, channels), **kwargs)


BAD_CONV_INPUTS = {
    "rank 2": (lambda: torch.randn(4, 5), ValueError, r"input: .*\(n, 4, h, w\).*\(4, 5\)"),
    "rank 5": (lambda: torch.randn(1, 1, 4, 3, 3), ValueError, r"input: .*\(1, 1, 4, 3, 3\)"),
    "channels": (
        lambda: torch.randn(2, 3, 3, 5),
        ValueError,
        r"input: .*4 channels.*\(2, 3, 3, 5\)",
    ),
    "no height": (
        lambda: torch.randn(2, 4, 0, 5),
        ValueError,
        r"input: .*h, w >= 1.*\(2, 4, 0, 5\)",
    ),
}
BAD_LINEAR_INPUTS = {
    "rank 0": (lambda: torch.tensor(1.0), ValueError, r"input: .*\(\.\.\., 4\).*scalar"),
    "features": (lambda: torch.randn(2, 3), ValueError, r"input: .*4 .*\(2, 3\)"),
}
BAD_INPUTS = {
    "float64": (lambda x: x.double(), TypeError, "input: .*torch.float32.*torch.float64"),
    "half": (lambda x: x.half(), TypeError, "input: .*torch.float32.*torch.float16"),
    "integer": (lambda x: x.long(), TypeError, "input: .*torch.float32.*torch.int64"),
    "bool": (lambda x: x > 0, TypeError, "input: .*torch.float32.*torch.bool"),
    "complex": (lambda x: x + 0j, TypeError, "input: .*torch.float32.*torch.complex64"),
    "meta": (lambda x: x.to("meta"), ValueError, "input: .*device cpu.*meta"),
    "array": (lambda x: x.numpy(), TypeError, "input: .*ndarray"),
    "none": (lambda x: None, TypeError, "input: .*NoneType"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("method", "kind"), LAYERS)
def test_bad_inputs(method, kind, training):
    layer = make(method, kind).train(training)
    shapes = BAD_CONV_INPUTS if kind == "conv" else BAD_LINEAR_INPUTS
    for bad, error, message in shapes.values():
        with pytest.raises(error, match=message):
            layer(bad())
    for bad, error, message in BAD_INPUTS.values():
        with pytest.raises(error, match=message):
            layer(bad(example(kind)))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"input: .*torch.float32.*torch.float64"),
    ):
        layer(example(kind).double())


@pytest.mark.parametrize(("method", "kind"), LAYERS)
def test_layer_on_meta_gives_shapes(method, kind):
    layer = make(method, kind).to("meta")
    for training in (True, False):
        y = layer.train(training)(example(kind).to("meta"))
        assert y.is_meta
        assert y.shape == ((2, 6, 3, 5) if kind == "conv" else (2, 6))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("method", "kind"), LAYERS)
def test_weights_that_are_not_finite(method, kind, value):
    names = [name for name, _ in make(method, kind).named_parameters()]
    assert "weight" in names
    for name in names:
        for training in (True, False):
            layer = make(method, kind).train(training)
            with torch.no_grad():
                getattr(layer, name).view(-1)[0] = value
            message = rf"{name}: expected finite values in {type(layer).__name__}.*1 NaN or Inf of"
            with pytest.raises(ValueError, match=message):
                layer(example(kind))
            with pytest.raises(ValueError, match=message):
                layer.lipschitz_bound((3, 5))
            with pytest.raises(ValueError, match=message):
                layer.to_plain((3, 5))


@pytest.mark.parametrize(("method", "kind"), LAYERS)
def test_input_that_is_not_finite_reaches_the_output(method, kind):
    for training in (True, False):
        x = example(kind)
        x.view(-1)[0] = math.nan
        assert make(method, kind).train(training)(x).isnan().any()


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize(("method", "kind"), LAYERS)
def test_all_zero_weights(method, kind, bias):
    layer = make(method, kind)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias.fill_(bias)
    x = example(kind).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(bool(g.isfinite().all()) for g in gradients)
    layer.eval()
    y = layer(x)
    torch.testing.assert_close(layer.to_plain((3, 5))(x), y)
    assert layer.lipschitz_bound() <= 1 + 1e-6
    identity = torch.zeros_like(y)
    identity[:, :4] = x
    offset = bias * torch.ones_like(y)
    expected = {
        "aol": offset,
        "bcop": offset,
        "cayley": identity + offset,  # (I + 0)^(-1) (I - 0) on top, 0 below
        "cpl": identity,
        "lot": offset,
        "sll": identity,
        "soc": getattr(layer, "_eval_coefficients", (1.0,))[0] * identity + offset,
    }[method]
    torch.testing.assert_close(y, expected)


def copy_as_float64(layer: lnn.LipschitzModule, method: str, kind: str) -> lnn.LipschitzModule:
    wide = make(method, kind, dtype=F64)
    wide.load_state_dict(layer.state_dict())
    return wide


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize(("method", "kind"), LAYERS)
def test_tiny_and_huge_weights(method, kind, scale):
    """Scaled together, row by row, and alone; against the same layer in float64."""
    parts = {
        "all": slice(None),
        "first": slice(0, 1),
        "all but the first": slice(1, None),
    }
    for part in parts.values():
        layer = make(method, kind)
        if method in ("bcop", "lot"):  # whose steps converge from there, in both dtypes
            layer.reset_parameters()
        with torch.no_grad():
            layer.weight += 0.05 * torch.randn_like(layer.weight)
            layer.weight[part] *= scale
            layer.bias *= min(scale, 1.0)  # CPL and SLL divide it by the weight
        wide = copy_as_float64(layer, method, kind)
        x = example(kind).requires_grad_()
        wide_x = x.detach().double().requires_grad_()
        weights = torch.randn_like(layer(x))
        layer, wide = (net.train() for net in (layer, wide))
        wide.load_state_dict(layer.state_dict())
        for net, point in ((layer, x), (wide, wide_x)):
            (net(point) * weights.to(point.dtype)).sum().backward()
        wide.load_state_dict(layer.state_dict())
        scale_of_x = float(x.norm())
        assert float((x.grad - wide_x.grad).norm()) < 1e-4 * float(wide_x.grad.norm())
        for name, parameter in layer.named_parameters():
            assert bool(parameter.grad.isfinite().all()), name
        layer.eval()
        wide.eval()
        with torch.no_grad():
            error = (layer(x) - wide(wide_x)).norm()
        assert float(error) < 1e-5 * (scale_of_x + float(layer.bias.norm()))
        assert layer.lipschitz_bound() <= 1 + 1e-6


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-7, 1e20])
@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize(("method", "name"), [("sll", "q"), ("cayley", "alpha")])
def test_other_parameters_tiny_and_huge(method, name, kind, value):
    for entries in (slice(0, 1), slice(None)):
        layer = make(method, kind)
        with torch.no_grad():
            getattr(layer, name).view(-1)[entries] = value
        x = example(kind)
        y = layer(x)
        y.square().sum().backward()
        assert bool(y.isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
        expected = y.detach()
        layer.eval()
        torch.testing.assert_close(layer(x), expected, rtol=3e-3, atol=3e-3)
        assert layer.lipschitz_bound() <= 1 + 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method, bias):
    conv = lnn.METHODS[method].conv(4, 6, 3, bias=bias)
    linear = lnn.METHODS[method].linear(4, 6, bias=bias)
    for layer, shape in ((conv, (0, 4, 3, 5)), (linear, (0, 4)), (linear, (2, 0, 4))):
        layer.zero_grad()
        layer.train()
        x = torch.zeros(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (*shape[:1], 6, *shape[2:]) if layer is conv else (*shape[:-1], 6)
        assert x.grad.shape == x.shape
        assert layer.weight.grad is not None
        assert not layer.weight.grad.any()
        assert layer.eval()(x).shape == y.shape


BAD_CONV_ARGUMENTS = {
    "no channels": ((0, 4, 3), {}, "in_channels: .*>= 1.*got 0"),
    "negative": ((4, -1, 3), {}, "out_channels: .*>= 1.*got -1"),
    "float channels": ((4.0, 4, 3), {}, r"in_channels: .*integer.*4\.0"),
    "bool channels": ((True, 4, 3), {}, "in_channels: .*integer.*True"),
    "text channels": (("4", 4, 3), {}, "in_channels: .*integer.*'4'"),
    "even kernel": ((4, 4, 2), {}, "kernel_size: .*odd.*got 2"),
    "zero kernel": ((4, 4, 0), {}, "kernel_size: .*odd.*got 0"),
    "negative kernel": ((4, 4, -3), {}, "kernel_size: .*odd.*got -3"),
    "float kernel": ((4, 4, 3.0), {}, r"kernel_size: .*integer.*3\.0"),
    "triple": ((4, 4, (3, 3, 3)), {}, r"kernel_size: .*pair.*\(3, 3, 3\)"),
    "no stride": ((4, 4, 3), {"stride": 0}, "stride: .*expected .*1.*got 0"),
    "stride text": ((4, 4, 3), {"stride": "2"}, "stride: .*pair.*got '2'"),
    "no dilation": ((4, 4, 3), {"dilation": (1, 0)}, r"dilation: .*expected .*1.*\(1, 0\)"),
    "groups": ((4, 4, 3), {"groups": 3}, "groups: .*expected .*got 3"),
    "no groups": ((4, 4, 3), {"groups": 0}, "groups: .*expected .*got 0"),
    "negative padding": ((4, 4, 3), {"padding": -1}, "padding: .*got -1"),
    "text padding": ((4, 4, 3), {"padding": "full"}, "padding: .*'same'.*'full'"),
    "wide circular": (
        (4, 4, 3),
        {"padding": 2, "padding_mode": "circular"},
        "padding: .*got 2",
    ),
    "reflect": ((4, 4, 3), {"padding_mode": "reflect"}, "padding_mode: .*circular.*'reflect'"),
    "replicate": ((4, 4, 3), {"padding_mode": "replicate"}, "padding_mode: .*'replicate'"),
    "int64": ((4, 4, 3), {"dtype": torch.int64}, "dtype: .*floating-point.*torch.int64"),
    "complex64": ((4, 4, 3), {"dtype": torch.complex64}, "dtype: .*floating-point.*complex64"),
}
BAD_SAME_SIZE_ARGUMENTS = {
    "not square": ((4, 4, (1, 3)), {}, r"kernel_size: .*square.*\(1, 3\)"),
    "stride pair": ((4, 4, 3), {"stride": (1, 2)}, r"stride: .*expected .*equal.*\(1, 2\)"),
    "negative stride": ((4, 4, 3), {"stride": (-1, -1)}, r"stride: .*>= 1.*\(-1, -1\)"),
    "dilation": ((4, 4, 3), {"dilation": 2}, "dilation: .*expected 1.*got 2"),
    "groups": ((4, 4, 3), {"groups": 2}, "groups: .*expected 1.*got 2"),
    "no padding": ((4, 4, 3), {"padding": 0}, "padding: .*'same' or 1.*got 0"),
    "valid": ((4, 4, 3), {"padding": "valid"}, "padding: .*'same' or 1.*'valid'"),
    "wide padding": ((4, 4, 3), {"padding": 2}, "padding: .*'same' or 1.*got 2"),
    "padding pair": ((4, 4, 3), {"padding": (1, 0)}, r"padding: .*'same' or 1.*\(1, 0\)"),
}
BAD_AOL_ARGUMENTS = {
    "even and odd": ((4, 4, (3, 2)), {}, r"kernel_size: .*odd.*\(3, 2\)"),
    "groups of in": ((4, 6, 3), {"groups": 3}, "groups: .*in_channels 4 and out_channels 6.*got 3"),
    "groups of out": ((6, 4, 3), {"groups": 3}, "groups: .*in_channels 6.*got 3"),
    "float groups": ((4, 4, 3), {"groups": 2.0}, r"groups: .*integer.*got 2\.0"),
    "wide circular": ((4, 4, 3), {"padding": (1, 2)}, r"padding: .*at most \(1, 1\), got \(1, 2\)"),
}
BAD_LINEAR_ARGUMENTS = {
    "no features": ((0, 4), {}, "in_features: .*>= 1.*got 0"),
    "negative": ((4, -2), {}, "out_features: .*>= 1.*got -2"),
    "float features": ((4, 4.5), {}, r"out_features: .*integer.*4\.5"),
    "int64": ((4, 4), {"dtype": torch.int64}, "dtype: .*floating-point.*torch.int64"),
}


@pytest.mark.parametrize("method", METHODS)
def test_bad_constructor_arguments(method):
    own = BAD_AOL_ARGUMENTS if method == "aol" else BAD_SAME_SIZE_ARGUMENTS
    for layer, table in (
        (lnn.METHODS[method].conv, BAD_CONV_ARGUMENTS | own),
        (lnn.METHODS[method].linear, BAD_LINEAR_ARGUMENTS),
    ):
        for arguments, keywords, message in table.values():
            with pytest.raises(ValueError) as error:
                layer(*arguments, **keywords)
            assert re.match(message, str(error.value))
            assert layer.__name__ in str(error.value)


def test_cayley_offers_circular_padding_only():
    with pytest.raises(ValueError, match=r"padding_mode: .*circular.*'zeros'"):
        lnn.CayleyConv2d(4, 4, 3, padding_mode="zeros")


@pytest.mark.parametrize("argument", ["terms", "eval_terms"])
def test_bad_number_of_terms(argument):
    for layer, sizes in ((lnn.SOCConv2d, (4, 4, 3)), (lnn.SOCLinear, (4, 4))):
        for value in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match=f"{argument}: .*>= 1, got {value}"):
                layer(*sizes, **{argument: value})


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_size(method):
    layer = make(method, "conv")
    if layer._depends_on_map_size:
        with pytest.raises(ValueError, match=r"input_size: .*got None"):
            layer.lipschitz_bound()
        for size in [(0, 3), (3,), (3, 3, 3), (2.5, 3)]:
            with pytest.raises(ValueError, match=r"input_size: expected \(height, width\)"):
                layer.lipschitz_bound(size)
    else:
        assert layer.lipschitz_bound() <= 1 + 1e-6


@pytest.mark.parametrize("layer", [lnn.FirstChannels, lnn.ZeroChannelPad])
def test_channel_selections(layer):
    for value in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match=rf"channels: {layer.__name__} .*>= 1, got {value!r}"):
            layer(value)
    x = torch.arange(24).reshape(1, 6, 2, 2)
    size = 4 if layer is lnn.FirstChannels else 8
    assert layer(size)(x).shape == (1, size, 2, 2)  # of any dtype
    assert layer(size)(x[:0]).shape == (0, size, 2, 2)
    assert layer(size)(x.float().to("meta")).is_meta
    size = 7 if layer is lnn.FirstChannels else 5
    with pytest.raises(ValueError, match=rf"input: {layer.__name__} .*{size}.*\(1, 6, 2, 2\)"):
        layer(size)(x)
    with pytest.raises(ValueError, match=rf"input: {layer.__name__} .*\(24,\)"):
        layer(4)(x.flatten())


BAD_NETWORKS = {
    "method": ({"method": "eco"}, "method: .*aol.*'eco'"),
    "size": ({"size": "XXL"}, "size: .*XS.*'XXL'"),
    "no size": ({"size": None}, "size: .*XS.*None"),
    "width": ({"width": 7}, "width: .*even.*got 7"),
    "no width": ({"width": 0}, "width: .*got 0"),
    "one class": ({"n_classes": 1}, "n_classes: .*got 1"),
    "many classes": ({"width": 4, "n_classes": 33}, "n_classes: .*2 to 32.*got 33"),
    "map": ({"input_size": (1, 6, 6)}, "input_size: .*power of two.*6x6"),
    "map not square": ({"input_size": (1, 8, 4)}, "input_size: .*square.*8x4"),
    "map too small": ({"input_size": (1, 1, 1)}, "input_size: .*1x1"),
    "channels": ({"width": 2, "input_size": (3, 8, 8)}, "input_size: .*2 channels.*got 3"),
    "rank": ({"input_size": (8, 8)}, r"input_size: .*\(8, 8\)"),
    "layers": ({"layers_per_block": 0}, "layers_per_block: .*1.*got 0"),
    "dtype": ({"dtype": torch.int64}, "dtype: .*floating-point.*torch.int64"),
    "float classes": ({"n_classes": 10.0}, r"n_classes: .*10\.0"),
    "float width": ({"width": 16.0}, r"width: .*16\.0"),
    "float layers": ({"layers_per_block": 2.5}, r"layers_per_block: .*2\.5"),
    "text width": ({"width": "16"}, "width: .*'16'"),
    "float map": ({"input_size": (1, 8.0, 8.0)}, r"input_size: .*8\.0"),
    "number as map": ({"input_size": 8}, "input_size: .*8"),
}


@pytest.mark.parametrize("case", BAD_NETWORKS)
def test_bad_networks(case):
    keywords, message = BAD_NETWORKS[case]
    with pytest.raises(ValueError, match=message):
        ConvNet(**{"method": "aol", "input_size": (1, 8, 8), **keywords})


def test_bad_images():
    model = ConvNet("aol", input_size=(1, 8, 8), width=4, layers_per_block=1)
    for shape in [(2, 1, 8, 9), (2, 3, 8, 8), (1, 8, 8), (2, 64)]:
        expected = rf"input: ConvNet expected \(n, 1, 8, 8\), got shape {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=expected):
            model(torch.randn(shape))
    with pytest.raises(TypeError, match=r"input: .*torch.float32.*torch.int64"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"input: .*device"):
        model(torch.zeros(2, 1, 8, 8, device="meta"))
    empty = model(torch.zeros(0, 1, 8, 8))
    assert empty.shape == (0, 10)
    empty.sum().backward()
    assert isinstance(model.linear.weight, nn.Parameter)
