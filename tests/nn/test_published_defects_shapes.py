"""Defects of published implementations: shapes, dtypes and NaN."""

import copy

import pytest
import torch
from moved_layers import METHODS, SIZES, make_conv
from torch import nn

from lipfast import certify
from lipfast import nn as lnn


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_forward_draws_no_random_vectors(method, k):
    conv = make_conv(method, 4, 4, k)
    linear = lnn.METHODS[method].linear(5, 4)
    for layer, x in ((conv, torch.randn(2, 4, 5, 5)), (linear, torch.randn(2, 5))):
        state = copy.deepcopy(layer.state_dict())
        for training in (True, False):
            layer.train(training)
            random = torch.get_rng_state()
            first = layer(x)
            layer.load_state_dict(state)  # CPL's power vector is the one buffer that moves on
            assert torch.equal(layer(x), first)
            assert torch.equal(torch.get_rng_state(), random)
            layer.load_state_dict(state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("method", METHODS)
def test_shapes_that_crash_somewhere(method, k, bias):
    for channels in [(4, 4), (3, 5), (5, 3), (1, 2), (2, 1), (1, 1)]:
        conv = make_conv(method, *channels, k, bias=bias)
        for size in SIZES:
            x = torch.randn(2, channels[0], *size, requires_grad=True)
            y = conv.train()(x)
            y.sum().backward()
            assert y.shape == (2, channels[1], *size)
            assert bool(y.isfinite().all())
            assert bool(x.grad.isfinite().all())
            assert conv.eval()(x).shape == y.shape
            assert conv(x[0]).shape == y.shape[1:]
        assert all(bool(p.grad.isfinite().all()) for p in conv.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, dtype):
    for k in (1, 3):
        conv = make_conv(method, 4, 6, k)
        linear = lnn.METHODS[method].linear(6, 4)
        x = torch.randn(2, 4, 5, 3)
        expected = linear.eval()(conv.eval()(x).mean(dim=(2, 3))).detach()
        for half in (True, False):
            net = [copy.deepcopy(layer).to(dtype) if half else layer for layer in (conv, linear)]
            for training in (True, False):
                inputs = x.to(dtype) if half else x
                with torch.autocast("cpu", dtype=dtype, enabled=not half):
                    y = net[0].train(training)(inputs).mean(dim=(2, 3)).to(inputs.dtype)
                    y = net[1].train(training)(y)
                if training:
                    y.float().sum().backward()
                assert bool(y.isfinite().all())
                assert all(bool(p.grad.isfinite().all()) for p in net[0].parameters())
            assert y.dtype == dtype or not half
            assert float((y.detach().float() - expected).norm()) < 0.1 * float(1 + expected.norm())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-12, -1e-9, 1e12])
def test_q_near_zero_gives_no_nan(value):
    torch.manual_seed(0)
    for layer, x in (
        (lnn.SLLConv2d(6, 6, 3), torch.randn(2, 6, 4, 4)),
        (lnn.SLLLinear(6, 6), None),
    ):
        x = torch.randn(2, 6) if x is None else x
        for entries in (slice(0, 1), slice(0, 5), slice(None)):
            with torch.no_grad():
                nn.init.normal_(layer.q)[entries] = value
            layer.zero_grad()
            y = layer.train()(x)
            y.square().sum().backward()
            assert bool(y.isfinite().all())
            assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
            assert bool(layer.eval()(x).isfinite().all())
            assert layer.lipschitz_bound() <= 1 + 1e-6


@pytest.mark.parametrize("method", ["cpl", "sll"])
def test_many_large_steps_give_no_nan(method):
    torch.manual_seed(0)
    model = nn.Sequential(make_conv(method, 4, 4, 3), make_conv(method, 4, 4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9, weight_decay=0.05)
    x, direction = torch.randn(2, 4, 4, 6, 6)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (model(x) * direction).mean()
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    model.eval()(x)
    assert certify.lipschitz_bound(model) <= 1 + 1e-6


def test_power_vector_that_the_convolution_maps_to_zero_gives_no_nan():
    conv = lnn.CPLConv2d(2, 2, 3, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :, 2, 1] = torch.eye(2)  # a shift: the vector's first row becomes 0
    conv(torch.randn(1, 2, 8, 8))
    assert conv.power_vector[..., 0, :8].abs().max() < 1e-6
    with torch.no_grad():
        conv.power_vector[..., 0, :8] = 0
    y = conv(torch.randn(1, 2, 1, 1))
    y.sum().backward()
    assert bool(conv.weight.grad.isfinite().all())
    with torch.no_grad():
        conv.power_vector.zero_()
        conv.weight[:, :, 1, 1] = torch.eye(2)
    x = -torch.ones(1, 2, 4, 4)
    assert not torch.equal(conv(-x), -x)  # it has not stopped for good at the identity
    assert bool(conv.power_vector[..., :4, :4].any())
