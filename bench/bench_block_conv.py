"""BCOP's weight and the build of its kernel alone, forward and backward: against published."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast.nn import BCOPConv2d
from lipfast.ops import block_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = {16: 2.0, 64: 2.2, 128: 2.8, 256: 2.8}  # on a CPU, times the speed of the published form
CHANNELS = [64, 256, 512, 1024] if DEVICE == "cuda" else [16, 64, 128, 256]


def step(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Value and gradients."""
    kernel = function(*inputs)
    return [kernel, *torch.autograd.grad(kernel, inputs, grad)]


def check(ours: list[Tensor], published: list[Tensor]) -> None:
    for a, b in zip(ours, published, strict=True):
        assert float((a - b).detach().norm()) < 1e-4 * float(b.detach().norm())


def orthogonal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(shape, generator=generator)).Q.to(DEVICE)


@pytest.mark.parametrize("channels", CHANNELS)
def bench_bcop_weight(compare, benchmark, channels):
    """Orthogonalisation and build, from matrices after some training."""
    torch.manual_seed(0)
    layer = BCOPConv2d(channels, channels, 3, device=DEVICE)
    with torch.no_grad():
        layer.weight += 0.02 * torch.randn_like(layer.weight) / channels**0.5
    grad = torch.randn(channels, channels, 3, 3, device=DEVICE)

    def run(backend: str | None) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            with lipfast.backend(backend):
                return step(lambda _: layer._training_weights((1, 1))[0], [layer.weight], grad)

        return call

    check(run(None)(), run("reference")())
    rounds = 15 if channels < 256 else 7
    ratios = compare({"ours": run(None), "published": run("reference")}, rounds=rounds)
    if DEVICE == "cpu":
        benchmark.extra_info["target"] = TARGETS[channels]
        print(f"target {TARGETS[channels]}x, reached {ratios['published']:.2f}x")


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("channels", CHANNELS)
def bench_block_conv(compare, channels, k, full):
    matrices = orthogonal(2 * k - 1, channels, channels)
    inputs = [matrices[0].clone(), matrices[1:, :, : channels // 2].clone()]
    inputs = [t.requires_grad_() for t in inputs]
    grad = torch.randn(channels, channels, k, k, device=DEVICE)

    def run(backend: str) -> Callable[[], list[Tensor]]:
        return lambda: step(lambda h, q: block_conv(h, q, backend=backend), inputs, grad)

    check(run("torch")(), run("reference")())
    rounds = 15 if channels < 256 else 7
    variants = {"torch": run("torch"), "published": run("reference")}
    if full:
        compiled = torch.compile(lambda h, q: block_conv(h, q, backend="reference"), dynamic=False)
        variants["published, compiled"] = lambda: step(compiled, inputs, grad)
        check(run("torch")(), variants["published, compiled"]())
    compare(variants, rounds=rounds)
