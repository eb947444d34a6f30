"""What layers, the network and ops cost, counted as on a GPU and compared with costs.json."""

import pytest
import torch
from torch import Tensor

from lipfast import backends, ops
from lipfast.models import ConvNet
from lipfast.nn import METHODS, plain_fourier
from lipfast.nn.base import LipschitzModule, SoundWeights
from lipfast.ops import fourier_conv_dft, fourier_conv_spectrum
from lipfast.reference import skew_kernel

from baseline.compare import load  # isort: skip
from baseline.costs import count, count_step  # isort: skip

MAP = (4, 32, 16, 16)  # n, c, h, w
KERNEL = (32, 32, 3, 3)
LAYERS = {
    f"{method} {kind}": (getattr(METHODS[method], kind), arguments, x)
    for method in METHODS
    for kind, arguments, x in [("conv", (32, 32, 3), MAP), ("linear", (64, 32), (16, 64))]
}

# op: (shapes of the tensors, the other arguments)
OPS = {
    "aol_rescale": ([KERNEL, (32,)], ()),
    "block_conv": ([(32, 32), (4, 32, 16)], ()),
    "cayley": ([(24, 48, 32)], ()),
    "conv_norm": ([KERNEL, (1, *MAP[1:])], ("zeros",)),
    "conv_norm_bound": ([KERNEL], ()),
    "fourier_conv": ([MAP, (16 * 9, 2, 32, 32)], ()),
    "gram_bound": ([KERNEL], ()),
    "polar": ([(24, 48, 32)], ()),
    "residual_conv": ([MAP, KERNEL, (32,), (32,)], ("zeros",)),
    "skew_exp": ([MAP, KERNEL], ((1.0, 1.0, 0.5, 0.17), "zeros")),
}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Let the layers take the path of a GPU, with plain torch for the ops and maxmin's saved bits.

    On a GPU batches are not cut to fit a cache, and training does not read parameters back.
    """
    rules = {
        op: (backends._Rule("cpu", 0, ("cpp",) if op == "maxmin" else ("torch",)),)
        for op in backends._FASTEST
    }
    check_finite = LipschitzModule._check_finite

    def only_where_on_device(self: LipschitzModule, *, on_device: bool) -> None:
        if on_device:
            check_finite(self, on_device=True)

    for module in (fourier_conv_dft, fourier_conv_spectrum, plain_fourier):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()  # tables that another test has built would not be counted
    monkeypatch.setattr(backends, "_FASTEST", rules)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 << 20)
    monkeypatch.setattr(LipschitzModule, "_check_finite", only_where_on_device)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, check_baseline):
    layer_type, arguments, shape = LAYERS[name]
    layer = layer_type(*arguments)
    x = torch.randn(shape, requires_grad=True)
    known = [x, *layer.parameters()]
    size = shape[2:] or (1, 1)
    counts = {
        f"{name}, training step": count_step(lambda: layer(x), known),
        f"{name}, training weights": count_step(lambda: layer.training_weights(size), known),
    }
    layer.eval()
    counts[f"{name}, sound weights"] = count(lambda: layer.lipschitz_bound(size))
    with torch.no_grad():
        counts[f"{name}, inference"] = count(lambda: layer(x))
    check_baseline("costs", counts)


@pytest.mark.skipif(backends.extension() is None, reason="lipfast._C is not built")
@pytest.mark.parametrize("method", METHODS)
def test_network(method, check_baseline, monkeypatch):
    network = ConvNet(method, "XS")
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    step = count_step(lambda: network(x), [x, *network.parameters()])

    # Weights with a proof take long, and run as any others do.
    built: dict[LipschitzModule, SoundWeights] = {}

    def build(layer: LipschitzModule, size: tuple[int, int]) -> SoundWeights:
        if layer not in built:
            built[layer] = SoundWeights(layer._training_weights(size), torch.ones(()))
        return built[layer]

    monkeypatch.setattr(LipschitzModule, "_build_sound", build)
    monkeypatch.setattr(LipschitzModule, "_check_finite", lambda *_, **__: None)
    network.eval()
    with torch.no_grad():
        first = count(lambda: network(x))
        inference = count(lambda: network(x))
    weights = {name: first[name] - inference[name] for name in first}
    name = f"{method} ConvNet XS"
    check_baseline(
        "costs",
        {
            f"{name}, training step": step,
            f"{name}, training weights without backward": weights,
            f"{name}, inference": inference,
        },
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_op(op, backend, check_baseline):
    shapes, rest = OPS[op]
    tensors = [torch.rand(shape) for shape in shapes]
    if op == "skew_exp":
        tensors[1] = skew_kernel(tensors[1])

    leaves = [tensor.requires_grad_() for tensor in tensors]

    def forward() -> Tensor | tuple[Tensor, ...]:
        return getattr(ops, op)(*leaves, *rest, backend=backend)

    step = count_step(forward, leaves)
    with torch.no_grad():
        counts = {f"{op} {backend}, training step": step, f"{op} {backend}": count(forward)}
    check_baseline("costs", counts)


def test_no_entry_is_left_over():
    counted = {*LAYERS, *(f"{method} ConvNet XS" for method in METHODS)}
    counted |= {f"{op} {backend}" for op in OPS for backend in ("torch", "reference")}
    assert {entry.split(",")[0] for entry in load("costs")["entries"]} == counted


def test_counts_of_known_functions():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert count(lambda: a @ b) == {"flops": 2 * 3 * 4 * 5, "launches": 1, "waits": 0}
    assert count(lambda: a.cfloat() @ b.cfloat())["flops"] == 4 * 2 * 3 * 4 * 5
    assert count(lambda: a.t().reshape(2, 6)[:, 1:]) == {"flops": 0, "launches": 1, "waits": 0}
    assert count(lambda: a.t()[1:].expand(2, 3, 3)) == {"flops": 0, "launches": 0, "waits": 0}
    assert count(lambda: float(a.sum())) == {"flops": 0, "launches": 2, "waits": 1}
    assert count(lambda: torch.linalg.inv_ex(torch.eye(6)))["flops"] == 2 * 6**3
    x = torch.randn(7, requires_grad=True)
    step = count_step(lambda: x.exp() * x, [x])  # saves x, which is known, and its exponential
    assert step == {"flops": 0, "launches": 7, "waits": 0, "saved_bytes": 28}


def test_looks_into_registered_operators():
    operator = torch.ops.lipfast.kernel_spectrum
    seen = count(lambda: operator(torch.randn(4, 4, 3, 3), 4, 4))
    assert seen["launches"] > 1
    assert seen["flops"] > 0
