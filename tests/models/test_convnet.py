"""The paper's network: sizes, shapes, parameters, arguments."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lipfast import nn as lnn
from lipfast.models import SIZES, ConvNet
from lipfast.nn.options import option_names
from lipfast.training import margin_cross_entropy


@pytest.mark.parametrize(("size", "millions"), [("XS", 1.57), ("S", 6.28), ("M", 25.12)])
def test_parameter_counts_are_those_of_the_paper(size, millions):
    with torch.device("meta"):
        net = ConvNet("aol", size)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert SIZES == {"XS": 16, "S": 32, "M": 64, "L": 128}


@pytest.mark.parametrize("method", list(lnn.METHODS))
@pytest.mark.parametrize(
    ("input_size", "kwargs", "n_classes"),
    [((1, 8, 8), {"width": 8, "layers_per_block": 1}, 10), ((3, 4, 4), {"width": 4}, 7)],
)
def test_scores_of_small_networks(method, input_size, kwargs, n_classes):
    torch.manual_seed(0)
    net = ConvNet(method, input_size=input_size, n_classes=n_classes, **kwargs)
    y = net(torch.randn(5, *input_size))
    assert y.shape == (5, n_classes)
    assert net(torch.empty(0, *input_size)).shape == (0, n_classes)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    again = ConvNet(**{**net.config, "input_size": tuple(net.config["input_size"])})
    again.load_state_dict(net.state_dict())


def test_blocks_follow_the_map_and_the_last_has_kernel_one():
    net = ConvNet("aol", "XS")
    convs = [m for m in net.modules() if isinstance(m, lnn.AOLConv2d)]
    assert [c.kernel_size[0] for c in convs] == [1] + [3] * 20 + [1] * 5
    assert [c.out_channels for c in convs[1::5]] == [16, 32, 64, 128, 256]
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    tiny = ConvNet("aol", "XS", n_classes=200, input_size=(3, 64, 64))
    convs = [m for m in tiny.modules() if isinstance(m, lnn.AOLConv2d)]
    assert [c.out_channels for c in convs[1::5]] == [8, 16, 32, 64, 128, 256]
    assert tiny(torch.randn(1, 3, 64, 64)).shape == (1, 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "aoc"}, "method: expected one of aol, bcop"),
        ({"size": "XXL"}, "size: expected one of XS, S, M, L, got 'XXL'"),
        ({"size": None}, "size: expected one of"),
        ({"width": 15}, "width: expected an even number"),
        ({"n_classes": 1}, "n_classes: expected 2 to 512, got 1"),
        ({"n_classes": 513}, "n_classes: expected 2 to 512"),
        ({"input_size": (3, 28, 28)}, "input_size: expected a square map, a power of two"),
        ({"input_size": (3, 32, 16)}, "input_size: expected a square map"),
        ({"input_size": (17, 32, 32)}, "input_size: expected at most 16 channels"),
        ({"layers_per_block": 0}, "layers_per_block: ConvNet expected an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(**{"method": "aol", **arguments})


@pytest.mark.parametrize(
    ("method", "options", "attributes"),
    [
        ("lot", {"ridge": 1e-4, "bias": False}, {"ridge": 1e-4, "bias": None}),
        (
            "soc",
            {"series": "taylor", "norm": "unfolding", "eval_terms": 9},
            {"series": "taylor", "norm": "unfolding", "eval_terms": 9},
        ),
        ("cpl", {"norm": "sound"}, {"norm": "sound"}),
        ("bcop", {}, {}),
    ],
)
def test_options_reach_every_layer_and_are_part_of_the_config(method, options, attributes):
    small = {"input_size": (1, 4, 4), "width": 4, "size": None, "layers_per_block": 1}
    net = ConvNet(method, **small, **options)
    again = ConvNet(**json.loads(json.dumps(net.config)))
    assert again.config == net.config
    assert set(net.config) - set(ConvNet(method, **small).config) == set(options)
    for model in (net, again):
        layers = [m for m in model.modules() if isinstance(m, lnn.LipschitzModule)]
        assert len(layers) == 4
        for layer in layers:
            assert {name: getattr(layer, name) for name in attributes} == attributes


def test_the_padding_mode_is_that_of_the_convolutions():
    net = ConvNet("aol", input_size=(1, 4, 4), width=4, padding_mode="zeros")
    convs = [m for m in net.modules() if isinstance(m, lnn.AOLConv2d)]
    assert {conv.padding_mode for conv in convs} == {"zeros"}
    with pytest.raises(ValueError, match="padding_mode: CayleyConv2d"):
        ConvNet("cayley", input_size=(1, 4, 4), width=4, padding_mode="zeros")


@pytest.mark.parametrize("option", ["ridge", "stride", "groups", "terms"])
def test_options_that_the_layers_do_not_take_are_named(option):
    with pytest.raises(TypeError, match=f"layer_options: AOLConv2d takes bias.*got '{option}'"):
        ConvNet("aol", input_size=(1, 4, 4), width=4, **{option: 2})
    assert option_names(lnn.AOLLinear) == ("bias",)
    assert option_names(lnn.SOCConv2d) == (
        *("bias", "padding_mode"),
        *("series", "terms", "eval_terms", "norm", "save"),
    )


def test_an_input_of_another_shape_is_refused():
    net = ConvNet("aol", input_size=(1, 8, 8), width=4, layers_per_block=1)
    for shape in [(2, 1, 16, 16), (1, 8, 8), (2, 3, 8, 8)]:
        with pytest.raises(ValueError, match=r"input: ConvNet expected \(n, 1, 8, 8\), got"):
            net(torch.randn(shape))


@pytest.mark.parametrize("method", list(lnn.METHODS))
@pytest.mark.slow
def test_a_training_step_compiles_as_one_graph(method):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = ConvNet(method, input_size=(1, 4, 4), width=4, layers_per_block=1)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = torch.randn(6, 1, 4, 4), torch.randint(10, (6,))

    def loss(x, y):
        return margin_cross_entropy(net(x), y)

    def gradients(function):
        net.load_state_dict(state)
        net.zero_grad()
        function(x, y).backward()
        return {name: p.grad for name, p in net.named_parameters()}

    compiled = gradients(torch.compile(loss, fullgraph=True))
    eager = gradients(loss)
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", list(lnn.METHODS))
def test_a_training_step_reads_no_value_back(method):
    with FakeTensorMode():
        net = ConvNet(method, input_size=(1, 4, 4), width=4, layers_per_block=1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            scores = net(torch.randn(6, 1, 4, 4))
            margin_cross_entropy(scores, torch.zeros(6, dtype=torch.long)).backward()
            optimizer.step()
        assert all(p.grad is not None for p in net.parameters())
