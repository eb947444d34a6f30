"""Bad input: the right answer, or an error that says which argument, what for and what came."""

import math

import pytest
import torch

from lipfast import nn as lnn

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
