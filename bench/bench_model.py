"""The paper's networks: training step, inference and weights, against published forms and peers.

By default XS and S on a CPU and all sizes on a GPU; `--size` and `--method` choose, `--full` adds
the published forms under torch.compile, which take minutes to compile, orthogonium's Cayley layers,
which take half a minute to make, inference of the published forms, and on a CPU LOT S, a published
step of which takes minutes, and inference of S, whose weights take longer to prove than to use.
"""

import functools
from collections.abc import Callable, Sequence

import peers
import pytest
import torch
from baseline.costs import count_step
from torch import Tensor, nn

import lipfast
from lipfast.models import ConvNet
from lipfast.nn.base import LipschitzModule
from lipfast.report.measure import training_memory_bytes
from lipfast.saved import saved_bytes
from lipfast.training import margin_cross_entropy

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH = 256 if GPU else 32
SECONDS = 2.0 if GPU else 4.0  # of each comparison
# the published series and norm of SOC are options of the layer, the other forms a backend
PUBLISHED = {"soc": {"series": "taylor", "norm": "unfolding"}}
SLOW_TO_MAKE = {"cayley"}
SLOW_ON_CPU = {("lot", "S")}

Function = Callable[[], object]


def on(backend: str, function: Function) -> Function:
    @functools.wraps(function)
    def call() -> object:
        with lipfast.backend(backend):
            return function()

    return call


def make(method: str, size: str, layers: peers.Make | None = None, **options) -> nn.Module:
    """The network some steps after its start."""
    torch.manual_seed(0)
    net = peers.network(method, size, layers, device=DEVICE, **options).to(DEVICE)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn_like(parameter) / max(1, parameter.numel()) ** 0.5
            parameter += 0.02 * parameter.norm() * noise
    return net


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    labels = torch.arange(BATCH, device=DEVICE) % 10
    return torch.randn(BATCH, 3, 32, 32, device=DEVICE) / 4, labels


def training_step(net: nn.Module, x: Tensor, labels: Tensor) -> Function:
    parameters = [p for p in net.parameters() if p.requires_grad]

    def step() -> Sequence[Tensor]:
        loss = margin_cross_entropy(net(x), labels)
        # orthogonium's SLL has parameters that it does not use
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [loss.detach(), *(g for g in gradients if g is not None)]

    return step


def other_backends(method: str) -> list[str]:
    """Forced for a whole network: those that every op of its layers has."""
    names = ("triton", "cuda", "torch") if GPU else ()
    usable = []
    for name in names:
        net = ConvNet(method, width=4, input_size=(3, 8, 8), layers_per_block=1).to(DEVICE)
        try:
            on(name, lambda net=net: net(torch.randn(2, 3, 8, 8, device=DEVICE)))()
        except ValueError:
            continue
        usable.append(name)
    return usable


def bench_training_step(compare, benchmark, batch, method, network_size, full):
    skip_slow(method, network_size, full)
    x, labels = batch
    net = make(method, network_size)
    published = make(method, network_size, **PUBLISHED.get(method, {}))
    plain = peers.plain_network(network_size, DEVICE)
    variants = {"lipfast": training_step(net, x, labels)}
    for name in other_backends(method):
        variants[name] = on(name, training_step(net, x, labels))
    variants["reference"] = on("reference", training_step(published, x, labels))
    if full:
        compiled = torch.compile(published)
        variants["reference, compiled"] = on("reference", training_step(compiled, x, labels))
    others = {} if method in SLOW_TO_MAKE and not full else peers.peers(method)
    nets = {"plain": plain}
    for name, layers in others.items():
        nets[name] = make(method, network_size, layers)
    variants |= {name: training_step(other, x, labels) for name, other in nets.items()}

    assert_no_expansion([net, *nets.values()], x)
    ratios = compare(
        variants,
        rounds=9,
        seconds=SECONDS,
        first_counts=not (GPU or full),
        verify=functools.partial(check, method),
    )
    nets = {"lipfast": net, "reference": published, **nets}
    counted = {name: net for name, net in nets.items() if name == "lipfast" or name in ratios}
    count_costs(benchmark, counted, x, labels)


def skip_slow(method: str, size: str, full: bool) -> None:
    if not GPU and not full and (method, size) in SLOW_ON_CPU:
        pytest.skip("minutes a step as published; with --full")


def check(method: str, results: dict[str, Sequence[Tensor]]) -> None:
    """The same loss and gradients as the reference."""
    for result in results.values():
        assert all(bool(t.isfinite().all()) for t in result)
    # not for another series, another state of the norm's estimate
    if method not in ("soc", "cpl") and "reference" in results:
        ours, reference = results["lipfast"], results["reference"]
        assert len(ours) == len(reference)
        assert float(ours[0]) == pytest.approx(float(reference[0]), rel=1e-3)
        flat = [torch.cat([t.flatten() for t in result[1:]]) for result in (ours, reference)]
        assert float((flat[0] - flat[1]).norm()) < 2e-2 * float(flat[1].norm())


def assert_no_expansion(nets: Sequence[nn.Module], x: Tensor) -> None:
    """Of two inputs near each other by any network but the plain one."""
    noise = torch.randn_like(x) / 100
    for net in nets:
        if any(isinstance(m, LipschitzModule) for m in net.modules()):
            with torch.no_grad():
                change = (net(x + noise) - net(x)).norm(dim=1) / noise.flatten(1).norm(dim=1)
            assert float(change.max()) < 1.05


def count_costs(benchmark, nets: dict[str, nn.Module], x: Tensor, labels: Tensor) -> None:
    """Kept bytes, FLOPs, launches, waits; on a GPU the peak memory."""
    info = benchmark.extra_info
    for name, net in nets.items():
        with lipfast.backend("reference" if name == "reference" else None):
            if not GPU:
                counts = count_step(lambda net=net: net(x), [x, labels, *net.parameters()])
            else:
                try:
                    kept = saved_bytes(lambda net=net: net(x), x, *net.parameters())
                    peak = training_memory_bytes(net, x, labels)
                except torch.OutOfMemoryError:
                    continue
                counts = {"saved_bytes": kept, "peak_bytes": peak}
        for quantity, number in counts.items():
            info.setdefault(quantity, {})[name] = number


def bench_inference(compare, benchmark, batch, method, network_size, full):
    if not GPU and network_size != "XS" and not full:
        pytest.skip("half a minute to prove the weights; with --full")
    x, _ = batch
    net = make(method, network_size).eval()
    plain = peers.plain_network(network_size, DEVICE).eval()
    nets = {"lipfast": net, "plain": plain}
    if full:
        nets["reference"] = make(method, network_size, **PUBLISHED.get(method, {})).eval()
    if not (method in SLOW_TO_MAKE and not full):
        for name, layers in peers.peers(method).items():
            nets[name] = make(method, network_size, layers).eval()
    with torch.no_grad():
        variants = {name: lambda other=other: other(x) for name, other in nets.items()}
        if full:
            variants["reference"] = on("reference", variants["reference"])
        compare(
            variants,
            rounds=9,
            seconds=SECONDS / 3,
            first_counts=False,  # it builds the weights
            verify=functools.partial(check_scores, method),
        )
    info = benchmark.extra_info
    info["images_per_second"] = {n: round(1e3 * BATCH / ms) for n, ms in info["median_ms"].items()}


def check_scores(method: str, results: dict[str, Tensor]) -> None:
    assert all(bool(scores.isfinite().all()) for scores in results.values())
    if method not in ("soc", "cpl") and "reference" in results:
        torch.testing.assert_close(results["lipfast"], results["reference"], rtol=1e-2, atol=1e-2)


def bench_weights(compare, method, network_size, batch, full):
    """Only the weights of all layers, with their graph."""
    skip_slow(method, network_size, full)
    x, _ = batch
    nets = {
        "lipfast": make(method, network_size),
        "reference": make(method, network_size, **PUBLISHED.get(method, {})),
    }

    if method in PUBLISHED:
        assert nets["lipfast"].config != nets["reference"].config

    def build(net: nn.Module) -> list[tuple[Tensor, ...]]:
        layers = [m for m in net.modules() if isinstance(m, LipschitzModule)]
        return [layer.training_weights(layer._last_map_size) for layer in layers]

    variants: dict[str, Function] = {}
    for name, net in nets.items():
        with torch.no_grad():
            net(x[:1])  # so that each layer knows its map
        variants[name] = functools.partial(build, net)
    variants["reference"] = on("reference", variants["reference"])
    compare(variants, rounds=9, seconds=SECONDS / 2, verify=check_weights)


def check_weights(results: dict[str, list[tuple[Tensor, ...]]]) -> None:
    """Finite; the gradients of `bench_training_step` compare them."""
    for built in results.values():
        assert all(bool(t.isfinite().all()) for weights in built for t in weights)
