"""A training step of the paper's networks with fused weights, and groups of layers in batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lipfast.models import ConvNet
from lipfast.nn import METHODS, LipschitzModule
from lipfast.weights import fuse, plan

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH = 256 if GPU else 32
TARGETS = {"lot": 1.15, "bcop": 1.15}  # on a CPU, size XS
LAYERS = 5
SHAPES = [(16, 32), (32, 16), (64, 8), (128, 4)]  # channels and side of XS


class _OperatorCounter(TorchDispatchMode):
    """Counts the operators that reach a backend, the backward pass included; views do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss and gradients."""
    loss = F.cross_entropy(model(x), labels)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def assert_close(values: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(values, expected, strict=True):
        assert float((a - b).detach().norm()) <= 2e-3 * float(b.detach().norm()) + 1e-6


@pytest.mark.parametrize("size", ["XS", "S"])
@pytest.mark.parametrize("method", METHODS)
def bench_network(compare, benchmark, method, size, full):
    if size == "S" and not GPU and not full:
        pytest.skip("fuse batches few of its layers on a CPU; with --full")
    torch.manual_seed(0)
    model = ConvNet(method, size, device=DEVICE)
    fused = fuse(copy.deepcopy(model))
    x = torch.randn(BATCH, 3, 32, 32, device=DEVICE)
    labels = torch.arange(BATCH, device=DEVICE) % 10
    for _ in range(2):  # after the first one the map sizes are known
        assert_close(training_step(fused, x, labels), training_step(model, x, labels))
    counts = {}
    for name, net in (("fused", fused), ("unfused", model)):
        with _OperatorCounter() as counter:
            training_step(net, x, labels)
        counts[name] = counter.count
    benchmark.extra_info["operators"] = counts
    steps = {
        "fused": lambda: training_step(fused, x, labels),
        "unfused": lambda: training_step(model, x, labels),
    }
    ratio = compare(steps, rounds=9)["unfused"]
    print(f"operators of a step: {counts}")
    if size == "XS" and method in TARGETS and not GPU:
        benchmark.extra_info["target"] = TARGETS[method]
        print(f"target {TARGETS[method]}x, reached {ratio:.2f}x")


@pytest.mark.parametrize(("channels", "side"), SHAPES)
@pytest.mark.parametrize("method", METHODS)
def bench_group(compare, method, channels, side):
    """Where the limits in lipfast/weights/fuse.py come from."""
    torch.manual_seed(0)
    conv = METHODS[method].conv
    layers = [conv(channels, channels, 3, device=DEVICE) for _ in range(LAYERS)]
    sizes = [(side, side)] * LAYERS
    parameters = [p for layer in layers for p in layer.parameters()]

    def gradients(built: list[tuple[Tensor, ...]]) -> list[Tensor]:
        weights = [w for one in built for w in one if w.requires_grad]
        # not ones: the entries of a skew kernel sum to zero
        cotangents = [torch.arange(w.numel(), device=w.device).sin().view(w.shape) for w in weights]
        found = torch.autograd.grad(weights, parameters, cotangents, allow_unused=True)
        return [g for g in found if g is not None]

    def one_by_one() -> list[Tensor]:
        return gradients([one_of(layer, size) for layer, size in zip(layers, sizes, strict=True)])

    states = [copy.deepcopy(layer.state_dict()) for layer in layers]
    batched = gradients(plan.build(layers, sizes))
    for layer, state in zip(layers, states, strict=True):
        layer.load_state_dict(state)  # both from the same power vectors
    assert_close(batched, one_by_one())
    variants = {"batch": lambda: gradients(plan.build(layers, sizes)), "one by one": one_by_one}
    compare(variants, rounds=9, seconds=0.5)


def one_of(layer: LipschitzModule, size: tuple[int, int]) -> tuple[Tensor, ...]:
    return plan.build([layer], [size])[0]
