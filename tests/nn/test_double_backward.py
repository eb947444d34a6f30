"""Gradients of gradients: penalties on dL/dx, and second derivatives of every layer."""

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from lipfast import nn as lnn
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)
F64 = torch.float64
# the estimates hold the vector of their buffer constant: second derivatives miss the vector's own
WITHOUT_VECTOR = {"cpl": {"norm": "sound"}, "soc": {"norm": "unfolding"}}


def make_network(method: str, dtype: torch.dtype = F64) -> ConvNet:
    torch.manual_seed(0)
    options = {"input_size": (3, 4, 4), "n_classes": 3, "layers_per_block": 1}
    network = ConvNet(method, width=4, **options)
    with torch.no_grad():  # away from the identity that some methods start with
        for name, parameter in network.named_parameters():
            if name.endswith("weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.to(dtype)


def penalised(network, x: Tensor) -> Tensor:
    """The loss of a critic with a penalty on dD/dx (Gulrajani et al. 2017), target 0.5."""
    x = x.detach().requires_grad_()
    scores = network(x)
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 0.5).square().mean() + scores.square().mean()


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_gradient_penalty_is_right(method):
    network = make_network(method)
    x = torch.randn(3, 3, 4, 4, dtype=F64)
    if method in WITHOUT_VECTOR:  # the gradient of an estimate is right where it has converged
        with torch.no_grad():
            for _ in range(300):
                network(x)
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    gradients = torch.autograd.grad(penalised(network, x), list(network.parameters()))
    directions = [torch.randn_like(g) for g in gradients]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def loss_at(step: float) -> Tensor:
        moved = zip(network.named_parameters(), directions, strict=True)
        state = {name: p.detach() + step * d for (name, p), d in moved}
        state |= {name: value.clone() for name, value in buffers.items()}
        return penalised(lambda images: functional_call(network, state, (images,)), x)

    eps = 1e-6
    expected = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_penalised_steps_in_float32_and_autocast(method):
    network = make_network(method, torch.float32)
    exact = copy.deepcopy(network).double()
    x = torch.randn(4, 3, 4, 4)
    expected = torch.autograd.grad(penalised(exact, x.double()), list(exact.parameters()))
    ours = torch.autograd.grad(penalised(network, x), list(network.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        short = torch.autograd.grad(penalised(network, x), list(network.parameters()))
    size = torch.stack([g.norm() for g in expected]).norm()
    for gradients, tolerance in ((ours, 1e-3), (short, 0.4)):  # of bfloat16: some ReLUs switch
        pairs = zip(gradients, expected, strict=True)
        error = torch.stack([(g.double() - e).norm() for g, e in pairs]).norm()
        assert error <= tolerance * size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [(2, 2), (3, 2)])
def test_second_derivatives_of_a_layer(method, channels):
    torch.manual_seed(0)
    options = WITHOUT_VECTOR.get(method, {})
    layer = lnn.METHODS[method].conv(*channels, 3, dtype=F64, **options)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(1, channels[0], 3, 2, dtype=F64)
    values = [p.detach() + 0.1 * torch.randn_like(p) for p in layer.parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        state |= {name: value.clone() for name, value in layer.named_buffers()}
        return functional_call(layer, state, (x,))

    inputs = [t.requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
def test_create_graph_does_not_change_the_gradients(method):
    network = make_network(method)
    x = torch.randn(2, 3, 4, 4, dtype=F64, requires_grad=True)
    found = []
    for graph in (False, True):
        same = copy.deepcopy(network)
        loss = same(x).cos().sum()
        found.append(torch.autograd.grad(loss, [x, *same.parameters()], create_graph=graph))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_hessians_of_the_input_in_evaluation(method):
    network = make_network(method).eval()
    x = torch.randn(1, 3, 4, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: network(x).square(), x, fast_mode=True)


@pytest.mark.parametrize("method", METHODS)
def test_meta_learning_through_a_step(method):
    """The gradient of the loss after a step of gradient descent, with the step's graph."""
    torch.manual_seed(0)
    layer = lnn.METHODS[method].linear(4, 3, dtype=F64, **WITHOUT_VECTOR.get(method, {}))
    x = torch.randn(5, 4, dtype=F64)
    start = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}

    def after_a_step(rate: float, shift: Tensor) -> Tensor:
        loss = functional_call(layer, start, (x + shift,)).cos().sum()
        gradients = torch.autograd.grad(loss, list(start.values()), create_graph=True)
        moved = {n: p - rate * g for (n, p), g in zip(start.items(), gradients, strict=True)}
        return functional_call(layer, moved, (x,)).square().cos().sum()

    shift = torch.zeros(5, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: after_a_step(0.1, s), shift, fast_mode=True)
