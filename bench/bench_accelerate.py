"""A training step of the paper's network of published layers, after `accelerate` and before."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from swap import published
from torch import Tensor, nn

import lipfast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 256 if torch.cuda.is_available() else 32
SLOW_ON_CPU = ("lot",)


def make_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A step of gradient descent that returns the scores."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        scores = model(x)
        F.cross_entropy(scores, labels).backward()
        optimizer.step()
        return scores.detach()

    return step


def check_in_double(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    """Compare scores and gradients where rounding does not choose another maximum."""
    results = []
    for model in (before, after):
        wide = copy.deepcopy(model).double()
        scores = wide(x)
        parameters = [p for p in wide.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(scores.square().sum(), parameters, allow_unused=True)
        results.append([scores.detach(), *(g for g in gradients if g is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-12)


@pytest.mark.parametrize("method", published.LAYERS)
def bench_training_step(compare, method, full):
    if DEVICE == "cpu" and not full and method in SLOW_ON_CPU:
        pytest.skip("half a minute a step before; with --full")
    torch.manual_seed(0)
    before = published.network(method).to(DEVICE)
    x = torch.randn(BATCH, 3, 32, 32, device=DEVICE)
    labels = torch.randint(10, (BATCH,), device=DEVICE)
    with torch.no_grad():
        before(x)  # creates what the published layers create late
    published.forget_weights(before)
    after = lipfast.accelerate(copy.deepcopy(before))
    check_in_double(before, after, x[:2].double())
    steps = {"after": make_step(after, x, labels), "before": make_step(before, x, labels)}
    compare(steps, rounds=7)
