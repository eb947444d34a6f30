"""torch.compile of layers in training and evaluation: one graph each, never a stale weight."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from lipfast import nn as lnn
from lipfast.models import ConvNet

METHODS = list(lnn.METHODS)
BY_TIME = [m if m == "lot" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


class Compiled:
    """A model by torch.compile without graph breaks, its training steps, and a count of graphs."""

    def __init__(self, model: nn.Module) -> None:
        torch.compiler.reset()
        self.graphs = 0
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.run = torch.compile(model, fullgraph=True, backend=self.backend)

    def backend(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)

    def step(self, x: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        self.run(x).square().sum().backward()
        self.optimizer.step()

    def evaluate(self, x: Tensor) -> Tensor:
        self.model.eval()
        return self.run(x)


def make_model(method: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(lnn.METHODS[method].conv(4, 4, 3), lnn.MaxMin())


@pytest.mark.parametrize("method", BY_TIME)
def test_two_graphs_serve_training_and_evaluation(method):
    compiled = Compiled(make_model(method))
    x = torch.randn(2, 4, 4, 4)
    compiled.step(x)
    compiled.evaluate(x)
    assert compiled.graphs == 2
    before = compiled.evaluate(x)
    for rate in (0.05, 0.01):
        for group in compiled.optimizer.param_groups:
            group["lr"] = rate
        compiled.step(x)
        y = compiled.evaluate(x)
        assert not torch.equal(y, before)  # the weights of evaluation are those of the new step
        # eager evaluation has a cache, which must be neither read nor left behind by the graph
        torch.testing.assert_close(y, compiled.model(x), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            compiled.model[0].weight.mul_(0.9).add_(0.01)
        torch.testing.assert_close(compiled.evaluate(x), compiled.model(x), rtol=1e-4, atol=1e-5)
        before = compiled.evaluate(x)
    assert compiled.graphs == 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cpl"])
def test_other_circumstances_take_one_graph_each(method):
    compiled = Compiled(make_model(method))
    compiled.step(torch.randn(2, 4, 4, 4))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            compiled.step(torch.randn(2, 4, 4, 4))
        compiled.step(torch.randn(2, 4, 4, 4))
    assert compiled.graphs == 2
    for batch in (3, 5, 2, 7):
        compiled.step(torch.randn(batch, 4, 4, 4))
    assert compiled.graphs == 3  # one for any batch size
    for _ in range(2):
        with torch.no_grad():
            compiled.run(torch.randn(2, 4, 4, 4))
    assert compiled.graphs == 4


@pytest.mark.parametrize("method", BY_TIME)
def test_a_compiled_run_is_the_eager_run(method):
    models = [make_model(method), make_model(method)]
    compiled = Compiled(models[0])
    optimizer = torch.optim.SGD(models[1].parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        x = torch.randn(2, 4, 4, 4)
        compiled.step(x)
        optimizer.zero_grad()
        models[1](x).square().sum().backward()
        optimizer.step()
    for (name, ours), expected in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_network_is_one_graph_by_the_default_backend_in_evaluation(method):
    torch.compiler.reset()
    torch.manual_seed(0)
    options = {"input_size": (1, 4, 4), "n_classes": 3, "layers_per_block": 1}
    network = ConvNet(method, width=4, **options).eval()
    compiled = torch.compile(network, fullgraph=True)
    for batch in (2, 3):
        x = torch.randn(batch, 1, 4, 4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_not_finite_is_not_hidden_by_the_graph():
    compiled = Compiled(make_model("aol"))
    x = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        compiled.evaluate(x)
        compiled.model[0].weight[0, 0, 0, 0] = torch.nan
        assert compiled.evaluate(x).isnan().any()
