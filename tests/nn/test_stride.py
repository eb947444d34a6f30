"""Strides by space-to-depth, in every method but AOL: forms, norms, errors, gradients."""

import io
import re

import pytest
import torch
import torch.nn.functional as F
from adversarial import F64, ROUNDING, TARGET, norm_of
from torch import nn

from lipfast import certify
from lipfast import nn as lnn

METHODS = [method for method in lnn.METHODS if method != "aol"]
CASES = [(m, p) for m in METHODS for p in lnn.METHODS[m].conv._padding_modes]
RESIDUAL = ("cpl", "sll")
SPECTRAL = ("cayley", "lot")
# for each stride; the rearranged map has 4 or 9 times the first number
CHANNELS = {2: [(3, 5), (1, 6), (2, 8)], 3: [(2, 4), (1, 11)]}


def make(method: str, *args, dtype=F64, seed=0, **keywords) -> lnn.LipschitzConv2d:
    torch.manual_seed(seed)
    layer = lnn.METHODS[method].conv(*args, dtype=dtype, **keywords)
    with torch.no_grad():  # away from the identity and from a bias of 0
        for parameter in (layer.weight, *([] if layer.bias is None else [layer.bias])):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def unstrided(layer: lnn.LipschitzConv2d, s: int) -> lnn.LipschitzConv2d:
    """The layer on rearranged maps, with the same parameters and buffers."""
    inner = type(layer)(
        s * s * layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        dtype=layer.weight.dtype,
    )
    inner.load_state_dict(layer.state_dict())
    return inner.train(layer.training)


@pytest.mark.parametrize("s", [2, 3])
@pytest.mark.parametrize(("method", "padding_mode"), CASES)
def test_strides_act_on_the_rearranged_map(method, padding_mode, s):
    for channels in CHANNELS[s]:
        for k, bias in ((1, True), (3, False), (3, True)):
            keywords = {"bias": bias, "padding_mode": padding_mode}
            layer = make(method, *channels, k, stride=s, **keywords)
            assert (layer.in_channels, layer.out_channels) == channels
            assert layer.stride == (s, s)
            x = torch.randn(2, channels[0], 4 * s, 3 * s, dtype=F64, requires_grad=True)
            for training in (True, False):
                layer.train(training)
                inner = unstrided(layer, s)
                y = layer(x)
                assert y.shape == (2, channels[1], 4, 3)
                expected = inner(F.pixel_unshuffle(x, s))
                torch.testing.assert_close(y, expected, rtol=0, atol=0)
                direction = torch.randn_like(y)
                sources = [x, *(layer.parameters() if training else [])]
                others = [x, *(inner.parameters() if training else [])]
                torch.testing.assert_close(
                    torch.autograd.grad(y, sources, direction),
                    torch.autograd.grad(expected, others, direction),
                )


@pytest.mark.parametrize("s", [2, 3])
@pytest.mark.parametrize(("method", "padding_mode"), CASES)
def test_bound_and_plain_form(method, padding_mode, s):
    for channels in CHANNELS[s]:
        layer = make(
            method, *channels, 3, stride=s, bias=method in RESIDUAL, padding_mode=padding_mode
        ).eval()
        size = (2 * s, 3 * s)
        bound = layer.lipschitz_bound(size)
        assert bound <= TARGET
        assert bound == unstrided(layer, s).lipschitz_bound((2, 3))
        at = torch.randn(channels[0], *size, dtype=F64) if method in RESIDUAL else None
        with torch.no_grad():
            assert norm_of(layer, channels[0], size, at=at) <= bound * (1 + ROUNDING)
        x = torch.randn(2, channels[0], *size, dtype=F64)
        plain = layer.to_plain(size)
        assert isinstance(plain[0], nn.PixelUnshuffle)
        for form in (plain, torch.jit.script(plain)):
            torch.testing.assert_close(form(x), layer(x))
            torch.testing.assert_close(form(x[0]), layer(x[0]))
        assert not any(type(m).__module__.startswith("lipfast") for m in plain.modules())


@pytest.mark.parametrize("method", ["bcop", "cayley", "lot"])
def test_effective_kernel_acts_on_the_rearranged_map(method):
    for k in (1, 3):
        layer = make(method, 2, 5, k, stride=2, padding_mode="circular", bias=False).eval()
        kernel = layer.effective_kernel((6, 10))
        x = torch.randn(2, 2, 6, 10, dtype=F64)
        inner = F.pixel_unshuffle(x, 2)
        assert kernel.shape[:2] == (5, 8)
        kh, kw = kernel.shape[2:]
        top, left = kh // 2, kw // 2
        pad = (left, kw - 1 - left, top, kh - 1 - top)
        y = F.conv2d(F.pad(inner, pad, mode="circular"), kernel)
        torch.testing.assert_close(y, layer(x))
    linear = make("soc", 2, 5, 1, stride=2, bias=False).eval()
    torch.testing.assert_close(F.conv2d(inner, linear.effective_kernel()), linear(x))


@pytest.mark.parametrize("method", METHODS)
def test_size_of_the_last_input_state_and_copies(method):
    layer = make(method, 3, 5, 3, stride=2).eval()
    x = torch.randn(2, 3, 8, 6, dtype=F64)
    y = layer(x)
    torch.testing.assert_close(layer.to_plain()(x), y)
    assert layer.lipschitz_bound() == layer.lipschitz_bound((8, 6))
    other = make(method, 3, 5, (3, 3), stride=(2, 2), padding=1, seed=1).eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), y, rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), y, rtol=0, atol=0)
    assert "3, 5, kernel_size=(3, 3), stride=(2, 2), " in repr(layer)
    assert "stride" not in repr(make(method, 3, 5, 3))


@pytest.mark.parametrize("method", METHODS)
def test_unbatched_empty_and_channels_last_inputs(method):
    layer = make(method, 3, 5, 3, stride=2).eval()
    x = torch.randn(2, 3, 6, 4, dtype=F64)
    y = layer(x)
    torch.testing.assert_close(layer(x[0]), y[0])
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), y)
    for training in (True, False):
        empty = x[:0].clone().requires_grad_()
        z = layer.train(training)(empty)
        z.sum().backward()
        assert z.shape == (0, 5, 3, 2)
        assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("method", METHODS)
def test_maps_that_are_no_multiple_of_the_stride(method):
    layer = make(method, 3, 5, 3, stride=2)
    name = type(layer).__name__
    for size in [(5, 4), (4, 5), (1, 1)]:
        message = f"input: {name} expected .*multiples of the stride 2, got {size[0]} x {size[1]}"
        for x in (torch.zeros(2, 3, *size, dtype=F64), torch.zeros(3, *size, dtype=F64)):
            with pytest.raises(ValueError, match=message):
                layer(x)
    if method in (*SPECTRAL, "cpl"):
        for query in (layer.lipschitz_bound, layer.to_plain):
            with pytest.raises(ValueError, match=r"input_size: .*the stride 2, got 5 x 4"):
                query((5, 4))
    for stride in [(1, 2), (2, 1), 0, -2, (0, 0), (2, 2, 2), 2.0, True, "2"]:
        message = f"stride: {name} expected .*got {re.escape(repr(stride))}"
        with pytest.raises(ValueError, match=message):
            lnn.METHODS[method].conv(3, 5, 3, stride=stride)


@pytest.mark.parametrize("method", METHODS)
def test_certified_chain_of_strided_layers(method):
    model = nn.Sequential(
        make(method, 3, 12, 3, stride=2), lnn.MaxMin(), make(method, 12, 6, 3, stride=3)
    ).eval()
    assert model(torch.randn(2, 3, 12, 6, dtype=F64)).shape == (2, 6, 2, 1)
    assert certify.lipschitz_bound(model) <= TARGET


@pytest.mark.parametrize("method", ["bcop", "sll"])
def test_compiles_without_a_graph_break(method):
    torch._dynamo.reset()
    layer = make(method, 3, 5, 3, stride=2, dtype=torch.float32)
    x = torch.randn(2, 3, 8, 6, requires_grad=True)
    results = []
    for form in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        y = form(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.weight])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
