"""Autocast with and without a gradient scaler, and channels-last maps from end to end."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lipfast import nn as lnn
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)


def make_network(method: str) -> ConvNet:
    torch.manual_seed(0)
    options = {"input_size": (3, 4, 4), "n_classes": 3, "layers_per_block": 1}
    return ConvNet(method, width=4, **options)


def relative(ours: list[Tensor], exact: list[Tensor]) -> float:
    errors = [(a.double() - b.double()).norm() for a, b in zip(ours, exact, strict=True)]
    return float(torch.stack(errors).norm() / torch.stack([b.norm() for b in exact]).norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_under_autocast_with_a_gradient_scaler(method, dtype):
    network = make_network(method)
    exact = copy.deepcopy(network)
    x, y = torch.randn(4, 3, 4, 4), torch.arange(4) % 3
    nn.functional.cross_entropy(exact(x), y).backward()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.detach().clone() for p in network.parameters()]
    with torch.autocast("cpu", dtype):
        scores = network(x)
        loss = nn.functional.cross_entropy(scores.float(), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in network.parameters()]
    assert all(g.dtype == torch.float32 for g in gradients)
    # a ReLU of CPL or SLL, or a pair of MaxMin, switches where bfloat16 rounds across its threshold
    assert relative(gradients, [p.grad for p in exact.parameters()]) <= 0.2
    scaler.step(optimizer)
    scaler.update()
    for parameter, old, gradient in zip(network.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), old - 0.1 * gradient)


@pytest.mark.parametrize("method", METHODS)
def test_a_scaler_skips_a_step_that_overflows(method):
    network = make_network(method)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = copy.deepcopy(dict(network.named_parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = network(torch.randn(2, 3, 4, 4)).float().square().sum() * 1e30
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**60
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_channels_last_keeps_the_values(method, training, dtype):
    """From end to end, in the weights too; kernels may sum in another order."""
    torch.manual_seed(0)
    network = nn.Sequential(
        lnn.METHODS[method].conv(4, 8, 3), lnn.MaxMin(), lnn.METHODS[method].conv(8, 8, 3)
    ).train(training)
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 5)
    found = []
    for model, layout in ((network, torch.contiguous_format), (other, torch.channels_last)):
        given = x.detach().contiguous(memory_format=layout).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = model(given)
        y.float().square().sum().backward()
        found.append([y.detach(), given.grad])
    assert relative(found[1], found[0]) <= (1e-5 if dtype is None else 3e-2)


# what is computed by Fourier transforms has its own order of memory
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("lot", "cayley")])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_channels_last_where_those_of_a_convolution_are(method, training):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    modes = lnn.METHODS[method].conv._padding_modes
    assert "zeros" in modes
    for mode in modes:
        plain = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)(x)
        layer = lnn.METHODS[method].conv(4, 4, 3, padding_mode=mode).train(training)
        if plain.is_contiguous(memory_format=torch.channels_last):
            for y in (layer(x), lnn.MaxMin()(layer(x))):
                assert y.is_contiguous(memory_format=torch.channels_last)
                assert not y.is_contiguous()
        assert layer(x.contiguous()).is_contiguous()
