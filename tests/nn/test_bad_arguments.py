"""Bad constructor arguments: an error that says which argument, what for and what came."""

import re

import pytest
import torch
from torch import nn

from lipfast import nn as lnn
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)

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
