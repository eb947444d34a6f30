"""Defects of published implementations: state and caches."""

import copy
import io
import pickle

import pytest
import torch
from moved_layers import METHODS, SIZES, make_conv
from torch import nn

from lipfast import nn as lnn
from lipfast.models import ConvNet


@pytest.mark.parametrize("method", METHODS)
def test_cache_holds_no_graph(method):
    """An attack differentiates the same evaluation layer again and again."""
    conv = make_conv(method, 3, 4, 3).eval()
    linear = lnn.METHODS[method].linear(4, 4).eval()
    x = torch.randn(2, 3, 5, 5)
    gradients = []
    for _ in range(3):
        point = x.clone().requires_grad_()
        linear(conv(point).mean(dim=(2, 3))).square().sum().backward()
        gradients.append(point.grad)
    assert torch.equal(gradients[0], gradients[2])
    assert float(gradients[0].norm()) > 0
    for layer in (conv, linear):
        assert not any(w.requires_grad for w in layer._cache.sound.weights)
        assert layer.weight.grad is None
    with torch.inference_mode():
        fresh = make_conv(method, 3, 4, 3, seed=1).eval()
        fresh(x)
    for layer in (fresh, conv):  # first run in inference mode, then attacked
        point = x.clone().requires_grad_()
        layer(point).square().sum().backward()
        assert float(point.grad.norm()) > 0


def changed_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight))


def loaded(layer):
    layer.load_state_dict({k: v + torch.rand_like(v) for k, v in layer.state_dict().items()})


def assigned(layer):
    state = {k: v + torch.rand_like(v) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def swapped(layer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loaded(layer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def stepped(layer, optimizer=torch.optim.SGD, **kwargs):
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer(layer.parameters(), 0.5, **kwargs).step()


def replaced(layer):
    layer.weight = nn.Parameter(torch.rand_like(layer.weight))


def written_as_data(layer):
    layer.weight.data = torch.rand_like(layer.weight)


def copied_as_data(layer):
    """Not counted by torch: train() or eval() is the documented call."""
    layer.weight.data.copy_(torch.rand_like(layer.weight))
    layer.eval()


CHANGES = {
    "in place": changed_in_place,
    "load_state_dict": loaded,
    "load_state_dict(assign=True)": assigned,
    "load_state_dict, swapping": swapped,
    "optimizer step": stepped,
    "foreach step": lambda layer: stepped(layer, foreach=True),
    "fused step": lambda layer: stepped(layer, fused=True),
    "fused AdamW": lambda layer: stepped(layer, torch.optim.AdamW, fused=True),
    "replaced": replaced,
    "weight.data =": written_as_data,
    "weight.data.copy_": copied_as_data,
    "train, step, eval": lambda layer: (layer.train(), stepped(layer), layer.eval()),
    "to another dtype": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_cache_survives_no_change(method, change):
    torch.manual_seed(0)
    layer = lnn.METHODS[method].conv(4, 4, 3, bias=False).eval()
    x = torch.randn(1, 4, 5, 5)
    before = layer(x)
    CHANGES[change](layer)
    dtype = layer.weight.dtype
    after = layer(x.to(dtype))
    fresh = lnn.METHODS[method].conv(4, 4, 3, bias=False, dtype=dtype).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(after, fresh(x.to(dtype)))
    if dtype == torch.float32 and not (method == "lot" and change == "in place"):
        assert not torch.equal(after, before)
    assert layer.lipschitz_bound() == fresh.lipschitz_bound()


@pytest.mark.parametrize("method", METHODS)
def test_cache_survives_no_other_resolution(method):
    for k in (1, 3, 5):
        conv = make_conv(method, 4, 4, k).eval()
        for size in [*SIZES, *reversed(SIZES)]:
            x = torch.randn(2, 4, *size)
            torch.testing.assert_close(conv(x), copy.deepcopy(conv)(x), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_cache_moves_with_the_module(method):
    conv = make_conv(method, 4, 4, 3).eval()
    x = torch.randn(1, 4, 5, 5)
    expected = conv(x)
    assert conv.to("meta")(x.to("meta")).is_meta
    conv = make_conv(method, 4, 4, 3).eval()
    conv(x)
    torch.testing.assert_close(conv.double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(conv.float()(x), copy.deepcopy(conv)(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles(method, training):
    model = nn.Sequential(make_conv(method, 3, 4, 3), lnn.MaxMin())
    x = torch.randn(2, 3, 4, 5)
    model(x)
    model.train(training)(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    state = copy.deepcopy(model.state_dict())
    expected = model(x)
    for other in copies:
        other.load_state_dict(state)
        assert other.training == training
        assert torch.equal(other(x), expected)
    copies[0][0].weight.data.zero_()
    copies[0].eval()
    assert not torch.equal(copies[0](x), expected)  # the copy does not share the cache
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_caller_gets_is_not_the_cache(method):
    for k, size in ((1, (1, 1)), (3, (4, 5))):
        conv = make_conv(method, 4, 4, k, bias=False).eval()
        x = torch.randn(1, 4, *size)
        expected = conv(x)
        plain = conv.to_plain(size)
        with torch.no_grad():
            for tensor in [*plain.parameters(), *plain.buffers()]:
                tensor.zero_()
            if method not in ("cpl", "sll") and (method, k) != ("soc", 3):
                conv.effective_kernel(size).zero_()
        assert torch.equal(conv(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_exist_from_the_start(method):
    """A parameter made in the first forward is unknown to the optimizer and to a fresh model."""
    torch.manual_seed(0)
    model = ConvNet(method, input_size=(1, 8, 8), width=4, layers_per_block=1)
    keys = list(model.state_dict())
    parameters = {id(p) for p in model.parameters()}
    x = torch.randn(3, 1, 8, 8)
    model(x).sum().backward()
    model.eval()(x)
    model(x)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in model.parameters()} == parameters
    assert all(p.grad is not None for p in model.parameters())
    fresh = ConvNet(method, input_size=(1, 8, 8), width=4, layers_per_block=1)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), model(x))
