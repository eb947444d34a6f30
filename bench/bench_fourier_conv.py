"""fourier_conv, forward and backward: against the published form and a plain convolution."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lipfast import backends, reference
from lipfast.ops import fourier_conv, fourier_conv_dft, kernel_spectrum

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH = 256 if GPU else 32
# Channels and side: maps of the paper's networks, and the same with one row of zeros around.
SHAPES = [(16, 32), (32, 16), (64, 8), (128, 4), (16, 34), (32, 18), (64, 10), (128, 6)]
METHODS = {"one table": (10**9, 0), "a table per axis": (0, 10**9), "fft": (0, 0)}


def inputs(channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """x and kernel, with gradients, and dL/dy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, channels, side, side, generator=generator)
    kernel = torch.randn(channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    grad = torch.randn(x.shape, generator=generator)
    return x.to(DEVICE).requires_grad_(), kernel.to(DEVICE).requires_grad_(), grad.to(DEVICE)


def step(function: Callable[..., Tensor], x: Tensor, kernel: Tensor, grad: Tensor) -> list[Tensor]:
    """Value and gradients."""
    y = function(x, kernel)
    return [y.detach(), *torch.autograd.grad(y, (x, kernel), grad)]


def ours(x: Tensor, kernel: Tensor, backend: str | None = None) -> Tensor:
    return fourier_conv(x, kernel_spectrum(kernel, x.shape[2:]), backend=backend)


def published(x: Tensor, kernel: Tensor) -> Tensor:
    return reference.fourier_conv(x, reference.kernel_spectrum(kernel, x.shape[2:]))


def plain(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, padding=1)


@pytest.mark.parametrize(("channels", "side"), SHAPES)
def bench_fourier_conv(compare, benchmark, channels, side, full):
    x, kernel, grad = inputs(channels, side)
    spectrum = kernel_spectrum(kernel.detach(), (side, side))
    chosen = backends.choose("fourier_conv", spectrum, x)
    functions: dict[str, Callable[..., Tensor]] = {chosen: ours}
    if GPU and chosen != "triton":
        functions["triton"] = lambda x, kernel: ours(x, kernel, "triton")
    functions["published"] = published
    if full:
        functions["published, compiled"] = torch.compile(published, dynamic=False)
    wide = [t.detach().double().requires_grad_() for t in (x, kernel)]
    exact = step(published, *wide, grad.double())
    for name, function in functions.items():
        for value, truth in zip(step(function, x, kernel, grad), exact, strict=True):
            assert (value.double() - truth).norm() < 1e-5 * truth.norm(), name
    functions["conv2d"] = plain
    variants = {name: lambda f=f: step(f, x, kernel, grad) for name, f in functions.items()}
    # real multiply-adds of the products with transfer matrices, and one of three as long backwards
    flops = 2 * 3 * 4 * len(spectrum) * BATCH * channels**2
    compare(variants, rounds=9, flops=flops)
    gigaflops = 1e-6 * flops / benchmark.extra_info["median_ms"][chosen]
    benchmark.extra_info["gflops"] = round(gigaflops, 1)
    print(f"{gigaflops:.0f} GFLOP/s in the products with transfer matrices alone")


@pytest.mark.parametrize(
    ("channels", "side"),
    [(128, 4), (128, 6), (64, 8), (64, 10), (32, 16), (32, 18), (16, 34), (8, 66), (2, 128)],
)
def bench_methods_of_the_transform(compare, monkeypatch, channels, side):
    """There and back: where the ways of the transform cross."""
    x = inputs(channels, side)[0].detach()

    def run(limits: tuple[int, int]) -> Tensor:
        monkeypatch.setattr(fourier_conv_dft, "_DIRECT", limits[0])
        monkeypatch.setattr(fourier_conv_dft, "_SEPARABLE", limits[1])
        return fourier_conv_dft.inverse(fourier_conv_dft.transform(x), side, side)

    limits = dict(METHODS)
    if side > 34:
        del limits["one table"]
    for name, limit in limits.items():
        torch.testing.assert_close(run(limit), x, rtol=1e-4, atol=1e-4, msg=name)
    compare({name: lambda limit=limit: run(limit) for name, limit in limits.items()})
