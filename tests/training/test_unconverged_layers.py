"""Layers whose iteration does not converge are named at the end of an epoch, and only there."""

import math
import warnings

import pytest
import torch
from torch import nn

from lipfast.data import Dataset, DeviceLoader, channel_mean
from lipfast.models import ConvNet
from lipfast.nn import BjorckLinear, LOTConv2d, LOTLinear
from lipfast.nn.convergence import RESIDUAL_LIMIT, unconverged_layers, warn_of_unconverged_layers
from lipfast.training import TrainConfig, train


def spread(layer: nn.Module, least: float) -> None:
    """Singular values from 1 to `least`, at every frequency."""
    with torch.no_grad():
        layer.weight.zero_()
        values = torch.logspace(0, torch.tensor(least).log10(), len(layer.weight))
        taps = layer.weight if layer.weight.dim() == 2 else layer.weight[:, :, 1, 1]
        taps[:, : len(values)] = values.diag()


def small_loader() -> DeviceLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 1, 4, 4), generator=generator).byte()
    data = Dataset("noise", images, torch.arange(8) % 3, ("a", "b", "c"))
    return DeviceLoader(data, batch_size=8, mean=channel_mean(data), train=True, augment=None)


def small_net(method: str) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(method, None, width=4, layers_per_block=1, input_size=(1, 4, 4), n_classes=3)


def test_training_names_the_layers_and_says_what_helps():
    net = small_net("lot")
    spread(net.block1[0], 1e-5)
    config = TrainConfig(epochs=1, lr=1e-6, weight_decay=0.0, batch_size=8)
    with pytest.warns(UserWarning, match=r"weights of block1.0 are not orthogonal.*lower learning"):
        train(net, small_loader(), config, progress=False)


@pytest.mark.parametrize("method", ["aol", "bcop", "cayley", "lot"])
def test_training_from_the_start_warns_of_nothing(method):
    config = TrainConfig(epochs=2, lr=0.02, weight_decay=1e-5, batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(small_net(method), small_loader(), config, progress=False)


@pytest.mark.parametrize("least", [0.5, 1e-2, 1e-5])
def test_names_follow_the_singular_values(least):
    net = nn.Sequential(LOTConv2d(4, 4, 3), BjorckLinear(5, 4), LOTLinear(4, 4), nn.ReLU())
    for layer in net[:3]:
        spread(layer, least)
    net[0](torch.randn(1, 4, 3, 5)), net[1](torch.randn(2, 5)), net[2](torch.randn(2, 4))
    expected = [] if least > 0.1 else ["0", "1", "2"]
    assert unconverged_layers(net) == expected
    for layer in net[:3]:
        (weight,) = layer._training_weights((3, 5))
        matrices = weight.detach().double()
        if weight.dim() == 4 and weight.shape[1] == 2:
            matrices = torch.complex(*matrices.unbind(1))
        values = torch.linalg.svdvals(matrices if matrices.is_complex() else matrices.flatten(1))
        assert (values.min() > 0.99) == (float(layer.polar_residual) < RESIDUAL_LIMIT)
        assert values.max() <= 1 + 1e-6
    net[0].reset_parameters()
    net[0](torch.randn(1, 4, 3, 5))
    assert unconverged_layers(net) == expected[1:]
    net[0].polar_residual.fill_(math.nan)
    assert unconverged_layers(net) == ["0", *expected[1:]]


def test_the_residual_is_kept_on_the_device_and_out_of_checkpoints():
    layer = LOTConv2d(4, 4, 3, device="meta")
    layer(torch.empty(1, 4, 5, 5, device="meta"))
    assert layer.polar_residual.is_meta
    assert "polar_residual" not in layer.state_dict()
    layer = LOTConv2d(4, 4, 3)
    spread(layer, 1e-5)
    layer.eval()(torch.randn(1, 4, 5, 5))
    layer.lipschitz_bound()
    assert layer.polar_residual == 0  # of training only


def test_says_nothing_of_other_models():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unconverged_layers(nn.Linear(2, 2))
