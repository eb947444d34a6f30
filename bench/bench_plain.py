"""Inference after to_plain: against torch's own convolutions, and against the layers themselves."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import lipfast
from lipfast.models import ConvNet
from lipfast.nn import METHODS, LipschitzConv2d, LipschitzLinear, MaxMin

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCHES = (1, 256) if GPU else (1, 32)
# Maps of the paper's networks: (channels, side).
SHAPES = [(64, 32), (256, 8)] if GPU else [(16, 32), (64, 8)]
TARGETS = ("aol", "bcop")
TARGET = 1.02  # of the plain network's time, AOL and BCOP


def ordinary(model: nn.Module) -> nn.Module:
    """The network with torch's convolutions of the same shapes and the same activation."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in model.named_children():
        if isinstance(module, LipschitzConv2d):
            channels = module.out_channels
            layers[name] = nn.Conv2d(
                module.in_channels,
                channels,
                module.kernel_size,
                padding=module.padding,
                padding_mode=module.padding_mode,
            )
        elif isinstance(module, LipschitzLinear):
            layers[name] = nn.Linear(module.in_features, module.out_features)
        elif isinstance(module, MaxMin):  # first_activation comes behind first_conv
            layers[name] = module.to_plain(channels)
        elif isinstance(module, nn.Sequential):
            layers[name] = ordinary(module)
        else:
            layers[name] = module
    return nn.Sequential(layers).to(DEVICE).eval()


def verified(functions: dict[str, nn.Module], x: torch.Tensor) -> None:
    """All but "Conv2d", whose weights are others, compute the same in float32."""
    expected = functions["layers"](x)
    for name, function in functions.items():
        if name != "Conv2d":
            error = (function(x) - expected).norm() / expected.norm()
            assert error < 1e-5, (name, float(error))


@torch.no_grad()
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("channels", "side"), SHAPES)
@pytest.mark.parametrize("method", METHODS)
def bench_plain_layer(compare, method, channels, side, batch, full):
    if not full and method not in TARGETS:
        pytest.skip("with --full")
    torch.manual_seed(0)
    layer = METHODS[method].conv(channels, channels, 3, device=DEVICE).eval()
    plain = lipfast.to_plain(layer, (channels, side, side))
    x = torch.randn(batch, channels, side, side, device=DEVICE)
    conv = ordinary(nn.Sequential(layer))
    functions = {"plain": plain, "layers": layer, "Conv2d": conv}
    verified(functions, x)
    compare({name: lambda f=f: f(x) for name, f in functions.items()}, rounds=25, seconds=1.0)


@torch.no_grad()
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("method", METHODS)
def bench_plain_network(compare, benchmark, method, batch, full):
    """The paper's XS; the target is for AOL and BCOP."""
    if not full and method not in TARGETS and (batch == 1 or method == "cpl"):
        pytest.skip("with --full: the others take as long to prove as to measure")
    torch.manual_seed(0)
    net = ConvNet(method, "XS", device=DEVICE).eval()
    plain = lipfast.to_plain(net)
    x = torch.randn(batch, 3, 32, 32, device=DEVICE)
    functions = {"plain": plain, "layers": net, "Conv2d": ordinary(net)}
    verified(functions, x)
    ratios = compare(
        {name: lambda f=f: f(x) for name, f in functions.items()}, rounds=15, seconds=2.0
    )
    if method in TARGETS:
        benchmark.extra_info["target"] = TARGET
        print(f"target {TARGET}x of Conv2d, reached {1 / ratios['Conv2d']:.2f}x")
