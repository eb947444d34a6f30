"""maxmin inside torch.compile: whole graphs, the same numbers, forced backends."""

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast import backends
from lipfast.nn.maxmin import MaxMin
from lipfast.ops import maxmin
from lipfast.reference.maxmin import maxmin as published


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("channels", [8, 7])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_training_step_is_one_graph(channels, memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), MaxMin(), nn.Conv2d(channels, 2, 3), MaxMin())
    x = torch.randn(4, 3, 8, 8).to(memory_format=memory_format)
    model.to(memory_format=memory_format)

    def step(model: nn.Module) -> list[Tensor]:
        loss = model(x).square().sum()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    compiled = torch.compile(model, fullgraph=True)
    for ours, expected in zip(step(compiled), step(model), strict=True):
        torch.testing.assert_close(ours, expected)


def test_forced_reference_is_traced_as_plain_torch():
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        graphs.append(graph)
        return graph

    x = torch.randn(2, 4, 3)
    function = torch.compile(lambda x: maxmin(x), fullgraph=True, backend=backend)
    for name, is_ours in [(None, True), ("reference", False), (None, True)]:
        with lipfast.backend(name):
            assert torch.equal(function(x), published(x))
        assert ("lipfast" in graphs[1 if name else 0].code) is is_ours
    assert len(graphs) == 2  # the third call found the first graph again


def test_context_manager_inside_a_graph():
    @torch.compile(fullgraph=True)
    def function(x: Tensor) -> Tensor:
        with lipfast.backend("reference"):
            return maxmin(x)

    x = torch.randn(2, 4, 3)
    assert torch.equal(function(x), published(x))
    assert backends.choose("maxmin", x) == "cpp"


def test_batch_size_may_change():
    function = torch.compile(maxmin, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 6, 4, 4)
        assert torch.equal(function(x), published(x))
