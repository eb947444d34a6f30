"""fuse: the hooks, and what else happens to a model around them."""

import copy

import pytest
import torch
from fused_networks import F64, network, step
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import CheckpointError, checkpoint

import lipfast
from lipfast.nn import METHODS, AOLConv2d, CPLConv2d, LipschitzModule, LOTConv2d
from lipfast.weights import fuse, is_fused, plan, unfuse


def image(*size: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(2, 4, *(size or (3, 5)), dtype=dtype)


def prebuilt_in_forward(model: nn.Module, x: Tensor) -> list[bool]:
    """For each layer, in the order of their forward passes, whether its weights were there."""
    seen: list[bool] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.prebuilt is not None))
        for layer in plan.lipschitz_layers(model).values()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def nothing_is_left(model: nn.Module) -> bool:
    return all(layer.prebuilt is None for layer in plan.lipschitz_layers(model).values())


def hooks(model: nn.Module) -> list[int]:
    found = (
        model._forward_pre_hooks,
        model._forward_hooks,
        model._forward_hooks_always_called,
    )
    return [len(dictionary) for dictionary in found]


def test_fuse_returns_the_model_and_twice_is_once():
    model = network("lot")
    keys = list(model.state_dict())
    assert fuse(fuse(model)) is model
    assert is_fused(model)
    assert hooks(model) == [1, 1, 1]
    assert list(model.state_dict()) == keys


def test_unfuse_takes_the_hooks_and_no_others():
    model = network("aol")
    model.register_forward_pre_hook(lambda *_: None)
    model.register_forward_hook(lambda *_: None, always_call=True)
    assert unfuse(fuse(model)) is model
    assert not is_fused(model)
    assert hooks(model) == [1, 1, 1]
    assert not any(prebuilt_in_forward(model, image()))
    assert unfuse(model) is model


def test_lipfast_offers_fuse():
    assert lipfast.fuse is fuse


def test_the_first_pass_of_layers_that_need_the_map_size_is_as_before():
    model = fuse(network("lot"))
    taps = [True, True, False, True, True]  # a single 1x1 or linear layer has no partner
    assert prebuilt_in_forward(model, image()) == [False] * 4 + [*taps[:2], *taps[2:]]
    assert prebuilt_in_forward(model, image()) == [True] * 4 + taps
    assert nothing_is_left(model)


@pytest.mark.parametrize("method", ["lot", "cayley", "cpl"])
def test_another_map_size_rebuilds(method):
    """A linear layer would fix the map size."""
    model = network(method)[:6]
    fused = fuse(copy.deepcopy(model))
    sizes = [(3, 5), (3, 5), (4, 2), (4, 2), (3, 5)]
    for last, size in zip([(3, 5), *sizes], sizes, strict=False):
        x = image(*size)
        if method == "cpl" and size != last:  # fuse foresees the old size
            for layer in model[:4]:
                layer.training_weights(last)
        ours, expected = step(fused, x), step(model, x)
        torch.testing.assert_close(ours["output"], expected["output"], rtol=1e-11, atol=1e-11)
        for name in ("0.weight.grad", "3.weight.grad"):
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-10, atol=1e-11)


def test_an_error_inside_leaves_no_weights():
    model = fuse(network("bcop"))
    with pytest.raises(ValueError, match="expected 4 channels"):
        model(torch.randn(2, 3, 3, 5, dtype=F64))
    assert nothing_is_left(model)
    with pytest.raises(ValueError, match="expected 60 channels"):  # after the others have run
        model(image(9, 9))
    assert nothing_is_left(model)
    assert model(image()).shape == (2, 7)


def test_a_weight_that_is_not_finite_is_named():
    model = fuse(network("aol"))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite values in AOLConv2d, got 9"):
        model(image())
    assert nothing_is_left(model)


def test_a_replaced_or_removed_layer_is_noticed():
    model = fuse(network("aol"))
    model(image())
    model[0] = AOLConv2d(4, 6, 1, dtype=F64)
    assert prebuilt_in_forward(model, image())[:4] == [False, True, False, True]
    del model[4]
    assert prebuilt_in_forward(model, image())[4:] == [False, False, True, True]


def test_evaluation_builds_nothing_and_training_follows():
    model = network("sll")
    fused = fuse(copy.deepcopy(model)).eval()
    assert not any(prebuilt_in_forward(fused, image()))
    x = image()
    torch.testing.assert_close(fused(x), model.eval()(x))
    assert any(prebuilt_in_forward(fused.train(), image()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model = network("cayley")
    fused, x = fuse(copy.deepcopy(model)), image()
    with mode():
        for _ in range(2):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-12, atol=1e-12)
    ours, expected = step(fused, x), step(model, x)
    torch.testing.assert_close(ours["0.weight.grad"], expected["0.weight.grad"])


def test_copies_are_fused_and_independent():
    model = fuse(network("bcop"))
    twin, average = copy.deepcopy(model), AveragedModel(model)
    unfuse(model)
    for other in (twin, average.module):
        assert is_fused(other)
        assert any(prebuilt_in_forward(other, image()))
        assert nothing_is_left(other)
    assert nothing_is_left(model)


def test_a_module_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (LOTConv2d(4, 4, 3, dtype=F64) for _ in range(2))
            self.again = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.b(self.a(x)))

    model = Twice()
    fused, x = fuse(copy.deepcopy(model)), image()
    for _ in range(2):
        ours, expected = step(fused, x), step(model, x)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11)


def test_tied_parameters_share_their_gradient():
    model = network("aol")
    model[2].weight = model[0].weight
    fused, x = fuse(copy.deepcopy(model)), image()
    ours, expected = step(fused, x), step(model, x)
    torch.testing.assert_close(ours["0.weight.grad"], expected["0.weight.grad"])


def test_a_part_of_a_fused_model_may_be_fused():
    model = network("bcop")
    fused = copy.deepcopy(model)
    inner = fuse(fused[:6])
    outer = fuse(nn.Sequential(inner, *fused[6:]))
    x = image()
    torch.testing.assert_close(outer(x), model(x), rtol=1e-12, atol=1e-12)
    assert nothing_is_left(outer)


def test_functional_call_sees_the_swapped_parameters():
    model, x = fuse(network("cayley")), image()
    model(x)
    other = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    ours = torch.func.functional_call(model, other, (x,))
    twin = unfuse(copy.deepcopy(model))
    twin.load_state_dict(other, strict=False)
    torch.testing.assert_close(ours, twin(x), rtol=1e-12, atol=1e-12)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(other)
    expected = step(twin, x)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[f"{name}.grad"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_what_is_fused(reentrant):
    model = network("lot")[:6]
    fused, x = fuse(copy.deepcopy(model)), image()
    for _ in range(2):
        ours = step(
            lambda_module(lambda z: checkpoint(fused, z, use_reentrant=reentrant), fused), x
        )
        expected = step(model, x)
    torch.testing.assert_close(ours["0.weight.grad"], expected["0.weight.grad"])
    torch.testing.assert_close(ours["output"], expected["output"])


def test_checkpointing_inside_what_is_fused_is_an_error_of_torch():
    body = network("lot")[:6]
    model = fuse(lambda_module(lambda z: checkpoint(body, z, use_reentrant=False), body))
    model(image())
    with pytest.raises(CheckpointError):
        model(image()).sum().backward()


def lambda_module(function, model: nn.Module) -> nn.Module:
    class Called(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

        def named_parameters(self, *args, **kwargs):
            return model.named_parameters(*args, **kwargs)

        def named_buffers(self, *args, **kwargs):
            return model.named_buffers(*args, **kwargs)

        def named_modules(self, *args, **kwargs):
            return model.named_modules(*args, **kwargs)

    return Called()


@pytest.mark.parametrize("method", ["lot", "bcop", "cpl"])
def test_compiled_whole_and_never_again_after_two_steps(method):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    conv = METHODS[method].conv
    model = nn.Sequential(conv(2, 2, 3), conv(2, 2, 3))
    fused = fuse(copy.deepcopy(model))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x, graphs = torch.randn(2, 2, 3, 3), []
    for _ in range(4):
        fused.zero_grad()
        model.zero_grad()
        ours, expected = compiled(x), model(x)
        (ours.square().sum() + expected.square().sum()).backward()
        torch.testing.assert_close(ours, expected)
        for a, b in zip(fused.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
        assert nothing_is_left(fused)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * 3
    assert not counters["graph_break"]


def test_distributed_data_parallel_is_fused_inside():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = network("bcop")
        parallel = fuse(DistributedDataParallel(copy.deepcopy(model)))
        assert is_fused(parallel.module)
        assert not is_fused(parallel)
        x = image()
        assert any(prebuilt_in_forward(parallel, x))
        ours, expected = step(parallel, x), step(model, x)
        for name, value in expected.items():
            other = ours[name if name in ours else f"module.{name}"]
            torch.testing.assert_close(other, value, rtol=1e-11, atol=1e-11)
        assert not is_fused(unfuse(parallel).module)
    finally:
        torch.distributed.destroy_process_group()


def test_bad_input():
    with pytest.raises(TypeError, match=r"fuse: model must be a torch.nn.Module, got str"):
        fuse("model")
    with pytest.raises(ValueError, match="expected a model with lipfast layers, got Sequential"):
        fuse(nn.Sequential(nn.Linear(2, 2)))
    model = network("aol")
    with pytest.raises(ValueError, match=r"call fuse before torch.compile"):
        fuse(torch.compile(model))
    model.compile()
    with pytest.raises(ValueError, match=r"call fuse before torch.compile"):
        fuse(model)


def test_a_single_layer_is_a_model_too():
    layer = fuse(CPLConv2d(3, 3, 3))
    assert isinstance(layer, LipschitzModule)
    assert layer(torch.randn(1, 3, 4, 4)).shape == (1, 3, 4, 4)
