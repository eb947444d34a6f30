"""The learned q of SLL: it learns, and no q breaks the layer or its bound."""

import math

import pytest
import torch
from adversarial import F64, TARGET, check
from hypothesis import given, settings
from hypothesis import strategies as st

from lipfast import nn as lnn

LAYERS = ["conv", "linear"]


def make(kind: str, dtype: torch.dtype = torch.float32) -> lnn.LipschitzModule:
    torch.manual_seed(0)
    if kind == "conv":
        return lnn.SLLConv2d(4, 4, 3, dtype=dtype)
    return lnn.SLLLinear(6, 6, dtype=dtype)


def example(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (8, 4, 5, 3) if kind == "conv" else (8, 6)
    return torch.randn(shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("kind", LAYERS)
def test_q_learns(kind):
    layer, x = make(kind), example(kind)
    target = example(kind).flip(0)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == "q")
    start = layer.q.detach().clone()
    before = layer(x).detach()
    optimizer = torch.optim.SGD([layer.q], lr=0.5)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert float(layer.q.grad.norm()) > 1e-4
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-3
    assert float((layer.q.detach() - start).norm()) > 1e-2
    for training in (True, False):
        change = (layer.train(training)(x) - before).norm() / before.norm()
        assert float(change.detach()) > 1e-2
    assert layer.lipschitz_bound() <= TARGET


@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_of_q_is_that_of_the_layer(kind):
    layer, x = make(kind, F64), example(kind, F64)[:2]
    q = layer.q.detach().requires_grad_()

    def function(q: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"q": q}, (x,))

    assert torch.autograd.gradcheck(function, (q,))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.floats(-12, 12), min_size=6, max_size=6),
    st.booleans(),
    st.integers(0, 2**12 - 1),
    st.sampled_from(LAYERS),
    st.sampled_from([torch.float32, F64]),
)
def test_any_q_keeps_the_bound_and_finite_numbers(exponents, mixed, bits, kind, dtype):
    """q from 1e-12 to 1e12, of one size or mixed, of any sign, with zeros among them."""
    layer, x = make(kind, dtype), example(kind, dtype)
    exponents = exponents if mixed else exponents[:1] * 6
    values = [10**e * (-1 if bits >> i & 1 else 1) for i, e in enumerate(exponents)]
    values = [0.0 if bits >> 6 + i & 1 and mixed else v for i, v in enumerate(values)]
    with torch.no_grad():
        layer.q.copy_(torch.tensor(values[: len(layer.q)], dtype=dtype))
    y = layer(x)
    y.square().sum().backward()
    assert bool(y.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
    trained = y.detach()
    layer.eval()
    bound = layer.lipschitz_bound((5, 3))
    assert math.isfinite(bound)
    assert bound <= TARGET
    torch.testing.assert_close(layer(x), trained, rtol=3e-3, atol=3e-3)
    check(layer, (2, 3) if kind == "conv" else (1, 1))
