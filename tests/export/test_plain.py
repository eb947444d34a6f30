"""to_plain: the same scores from torch's own modules, for every method and around them."""

import copy
import math

import pytest
import torch
from swap import published
from torch import nn

import lipfast
from lipfast import nn as lnn
from lipfast.certify import lipschitz_bound
from lipfast.export.certificate import fingerprint
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)
F64 = torch.float64


def network(method: str, dtype: torch.dtype = F64, **kwargs) -> ConvNet:
    torch.manual_seed(0)
    net = ConvNet(method, width=8, input_size=(3, 8, 8), layers_per_block=2, dtype=dtype, **kwargs)
    return moved(net)


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """The model with parameters away from their start."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def lipfast_classes(model: nn.Module) -> list[type]:
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return [kind for kind in kinds if kind.__module__.startswith("lipfast")]


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_the_papers_network_are_the_same(method):
    net = network(method)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    plain = lipfast.to_plain(net)
    assert net.training
    assert all(m._cache is None for m in net.modules() if isinstance(m, lnn.LipschitzModule))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not lipfast_classes(plain)
    assert list(dict(plain.named_children())) == list(dict(net.named_children()))
    assert not any(p.requires_grad for p in plain.parameters())
    assert not any(m.training for m in plain.modules())
    x = torch.randn(5, 3, 8, 8, dtype=F64, requires_grad=True)
    y, expected = plain(x), net.eval()(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(v.square().sum(), x)[0] for v in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_float32_scores_are_as_near_to_float64_as_those_of_the_layers(method):
    net = network(method, torch.float32).eval()
    exact = copy.deepcopy(net).double()
    x = torch.randn(64, 3, 8, 8)
    truth = exact(x.double())
    error, theirs = ((f(x) - truth).norm() / truth.norm() for f in (lipfast.to_plain(net), net))
    assert error < 2 * theirs + 1e-6


def test_orthogonal_kernels_become_convolutions_and_matrices():
    for method in ("aol", "bcop"):
        kinds = {type(m) for m in lipfast.to_plain(network(method)).modules()}
        assert kinds >= {nn.Conv2d, nn.Linear, nn.PixelUnshuffle, nn.Flatten, nn.Sequential}
        assert {kind.__name__ for kind in kinds if kind.__module__ == "torch.fx.graph_module"} == {
            "_PlainImage",
            "_PlainMaxMin",
        }


@pytest.mark.parametrize("method", METHODS)
def test_channels_that_nobody_needs_are_left_out(method):
    """8 of which 3 are given, the first half of each block, 10 classes of 64 features."""
    plain = lipfast.to_plain(network(method))
    identities = [name for name, m in plain.named_modules() if type(m) is nn.Identity]
    assert identities == ["pad", "block1.4", "block2.4", "block3.4", "classes"]
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    seen = {}
    for name, module in plain.named_modules():
        module.register_forward_hook(lambda m, i, y, name=name: seen.update({name: y.shape[1]}))
    plain(x)
    assert [seen[n] for n in ("first_conv", "block1.2", "block2.2", "block3.2", "linear")] == [
        8,
        4,
        8,
        16,
        10,
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [2, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_narrower_layers_of_any_shape(method, first, stride):
    torch.manual_seed(0)
    conv, linear = lnn.METHODS[method].conv, lnn.METHODS[method].linear
    model = nn.Sequential(
        lnn.ZeroChannelPad(4),
        conv(4, 6, 3, stride=stride, dtype=F64),
        nn.Sequential(lnn.MaxMin(), lnn.FirstChannels(first)),
        conv(first, 5, 3, bias=False, dtype=F64),
        lnn.FirstChannels(min(first, 5)),
        nn.Flatten(),
        linear(min(first, 5) * (4 // stride) ** 2, 7, dtype=F64),
        lnn.MaxMin(),
        lnn.FirstChannels(first),
    )
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    expected = moved(model).eval()(x)
    plain = lipfast.to_plain(model, (2, 4, 4))
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    assert type(plain[0]) is nn.Identity
    assert (type(plain[2][1]) is nn.Identity) == (first % 2 == 0)
    with pytest.raises(RuntimeError, match=r"channels|shapes"):
        plain(x[:, :1])


def test_grouped_shared_and_hooked_layers_are_not_narrowed():
    grouped = lnn.AOLConv2d(4, 4, 3, groups=2)
    shared = lnn.AOLConv2d(4, 4, 3)
    hooked = lnn.AOLConv2d(4, 4, 3)
    hooked.register_forward_hook(lambda module, args, y: y.flip(1))
    for layers in ([grouped], [shared, shared], [hooked]):
        model = moved(nn.Sequential(*layers, lnn.FirstChannels(2))).eval()
        x = torch.randn(2, 4, 5, 5)
        plain = lipfast.to_plain(model, (4, 5, 5))
        assert plain[0].weight.shape[0] == 4
        torch.testing.assert_close(plain(x), model(x))
        assert len(set(map(id, plain))) == len(set(map(id, model)))


class Residual(nn.Module):
    """A module of somebody else's around lipfast's layers."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.conv = lnn.METHODS[method].conv(4, 4, 3)
        self.act = lnn.MaxMin()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.norm = nn.BatchNorm2d(4)
        self.pad = lnn.ZeroChannelPad(5)
        self.head = nn.Sequential(
            lnn.PixelUnshuffle(2), nn.Flatten(), lnn.METHODS[method].linear(320, 3)
        )

    def forward(self, x):
        x = x + self.scale * self.act(self.norm(self.conv(x)))
        return self.act(self.head(self.act(self.pad(self.act(x)))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("example", [False, True])
def test_modules_of_other_classes_stay(method, example):
    torch.manual_seed(0)
    model = moved(Residual(method))
    x = torch.randn(4, 4, 8, 8)
    model(x)  # running statistics
    plain = lipfast.to_plain(model, x if example else (4, 8, 8))
    assert type(plain) is Residual
    assert model.training
    assert not plain.training
    torch.testing.assert_close(plain(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert not lipfast_classes(plain)
    assert set(plain.certificate["layer_bounds"]) == {"conv", "norm", "head.2"}


@pytest.mark.parametrize("method", published.LAYERS)
def test_accelerated_networks_of_published_layers(method):
    torch.manual_seed(0)
    net = published.network(method, width=8, blocks=3, layers=1)
    x = torch.randn(2, 3, 8, 8)
    net.eval()(x)  # creates what the published layers create late
    published.forget_weights(net)
    lipfast.accelerate(net)
    plain = lipfast.to_plain(net, (3, 8, 8))
    assert not lipfast_classes(plain)
    torch.testing.assert_close(plain(x), net(x), rtol=1e-4, atol=1e-5)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, lnn.LipschitzModule)}
    assert len(layers) == 5
    bounds = {name: layer.lipschitz_bound() for name, layer in layers.items()}
    finite = {name: bound if math.isfinite(bound) else None for name, bound in bounds.items()}
    assert plain.certificate["layer_bounds"] == finite


def test_hooks_of_lipfast_are_left_behind():
    net = lipfast.fuse(network("aol", torch.float32))
    hooks = len(net._forward_pre_hooks)
    plain = lipfast.to_plain(net)
    assert len(net._forward_pre_hooks) == hooks > 0
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    assert plain.certificate["lipschitz_bound"] <= 1 + 1e-6


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
@pytest.mark.parametrize("known", [False, True])
def test_maxmin_for_any_channels(channels, shape, known):
    x = torch.randn(4, channels, *shape)
    x[0, 0] = float("nan")
    x[1] = 0
    plain = lnn.MaxMin().to_plain(channels if known else None)
    torch.testing.assert_close(plain(x), lnn.MaxMin()(x), rtol=0, atol=0, equal_nan=True)
    assert plain(x[:0]).shape == x[:0].shape


def test_helpers_without_a_known_size():
    model = nn.Sequential(lnn.ZeroChannelPad(7), lnn.MaxMin(), lnn.FirstChannels(5))
    x = torch.randn(2, 3, 4, 4)
    plain = lipfast.to_plain(model)
    assert torch.equal(plain(x), model(x))
    assert plain.certificate["input_size"] is None
    assert plain.certificate["lipschitz_bound"] == 1


def test_a_single_layer_and_copies_keep_the_certificate():
    for method in METHODS:
        layer = lnn.METHODS[method].conv(4, 4, 3)
        plain = lipfast.to_plain(layer, (4, 5, 5))
        again = copy.deepcopy(plain)
        assert again.certificate == plain.certificate == lipfast.to_plain(again).certificate
        assert list(plain.certificate["layer_bounds"].values()) == [layer.lipschitz_bound((5, 5))]


def test_compiled_wrapped_and_parametrised_models():
    torch.manual_seed(0)
    net = network("lot", torch.float32)
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(net).eval()(x)
    compiled = torch.compile(net, backend="eager")
    nested = nn.Sequential(torch.compile(net, backend="eager"))
    in_place = copy.deepcopy(net)
    in_place.compile(backend="eager")
    for model in (compiled, nested, in_place, nn.DataParallel(net)):
        plain = lipfast.to_plain(model, (3, 8, 8))
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)
        assert not any(isinstance(m, torch._dynamo.OptimizedModule) for m in plain.modules())
        assert plain.certificate["lipschitz_bound"] <= 1 + 1e-6
    layer = lnn.AOLConv2d(4, 4, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(lipfast.to_plain(layer)(x), layer.eval()(x))


def test_inside_inference_mode_and_autocast():
    net = network("cayley", torch.float32).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)
    with torch.inference_mode():
        plain = lipfast.to_plain(net)
    assert not any(p.is_inference() for p in plain.state_dict().values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = lipfast.to_plain(net)
    assert fingerprint(other) == fingerprint(plain)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


def test_a_shared_layer_stays_shared_and_needs_one_map_size():
    for method in METHODS:
        layer = lnn.METHODS[method].conv(4, 4, 3)
        model = nn.Sequential(layer, lnn.MaxMin(), layer)
        plain = lipfast.to_plain(model, (4, 6, 6))
        assert plain[0] is plain[2]
        halved = nn.Sequential(layer, nn.AvgPool2d(2), layer)
        if layer._depends_on_map_size:
            with pytest.raises(ValueError, match=r"one size at '0'.*\(3, 3\), \(6, 6\)"):
                lipfast.to_plain(halved, (4, 6, 6))
        else:
            x = torch.randn(2, 4, 6, 6)
            expected = halved.eval()(x)
            torch.testing.assert_close(lipfast.to_plain(halved, (4, 6, 6))(x), expected)


class Doubling(lnn.AOLConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class LooksInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = lnn.AOLConv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x) * self.conv.weight.sum()


def nan_weights() -> nn.Module:
    net = network("aol")
    net.block1[2].weight.data[0, 0] = float("nan")
    return net


@pytest.mark.parametrize(
    ("model", "input_size", "error", "message"),
    [
        (lambda: 3, None, TypeError, "model: expected an nn.Module, got int"),
        (lambda: nn.Sequential(lnn.LOTConv2d(3, 3, 3)), None, ValueError, "LOTConv2d at '0'"),
        (lambda: lnn.CPLConv2d(3, 3, 3), None, ValueError, "CPLConv2d at 'the top' depend"),
        (lambda: network("aol"), (3, 4, 4), ValueError, r"no input of shape \(1, 3, 4, 4\)"),
        (lambda: network("aol"), (3, 0, 4), ValueError, r"input_size: expected integers >= 1"),
        (lambda: network("aol"), 8, ValueError, r"no input of shape \(1, 8\)"),
        (lambda: network("aol"), "388", ValueError, "input_size: expected integers"),
        (lambda: network("aol"), torch.zeros(3), ValueError, "expected an example input"),
        (nan_weights, None, ValueError, "block1.2.weight: expected finite values"),
        (lambda: ConvNet("aol", device="meta"), None, ValueError, "first_conv.weight.*meta"),
        (lambda: nn.Sequential(Doubling(3, 3, 3)), None, TypeError, "Doubling at '0' has a forw"),
        (lambda: moved(LooksInside()), (3, 4, 4), RuntimeError, "does not compute the scores"),
    ],
)
def test_errors_say_what_and_where(model, input_size, error, message):
    with pytest.raises(error, match=message):
        lipfast.to_plain(model(), input_size)


def test_a_model_without_lipfast_layers_is_copied():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.LayerNorm(4))
    plain = lipfast.to_plain(model, (3,))
    assert plain is not model
    assert model.training
    assert torch.equal(plain[0].weight, model[0].weight)
    assert plain.certificate["lipschitz_bound"] == lipschitz_bound(model, torch.zeros(1, 3))
