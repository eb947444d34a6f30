"""cayley, forward and backward: against the published form, on the spectra of layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipfast import backends, reference
from lipfast.ops import cayley, kernel_spectrum
from lipfast.saved import saved_bytes

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Channels and side of the map, as in the paper's networks.
SHAPES = [(16, 32), (32, 16), (64, 8), (128, 4)]
if GPU:
    SHAPES += [(256, 8), (512, 4)]
TARGET = 1.8  # on a CPU, times the speed of the published form


def published(kernel: Tensor, side: int) -> Tensor:
    """Transfer matrices as the layer of the paper makes them, in complex numbers."""
    return reference.cayley(reference.kernel_spectrum(kernel, (side, side)))


def step(function: Callable[[Tensor], Tensor], weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Value and gradient."""
    out = function(weight)
    return out.detach(), torch.autograd.grad(out, weight, grad)[0]


@pytest.mark.parametrize(("channels", "side"), SHAPES)
def bench_cayley_weight(compare, benchmark, channels, side, full):
    """From the taps to the planar transfer matrices and back."""
    generator = torch.Generator().manual_seed(0)
    shape = (channels, channels, 3, 3)
    weight = (torch.rand(shape, generator=generator) * 2 - 1) / (9 * channels) ** 0.5
    weight = weight.to(DEVICE).requires_grad_()
    matrices = kernel_spectrum(weight.detach(), (side, side))
    grad = torch.randn(matrices.shape, generator=generator).to(DEVICE)
    complex_grad = torch.complex(grad[:, 0], grad[:, 1])
    chosen = backends.choose("cayley", matrices)

    def planar(name: str | None) -> Callable[[Tensor], Tensor]:
        return lambda w: cayley(kernel_spectrum(w, (side, side)), planar=True, backend=name)

    functions = {chosen: planar(chosen)}
    if chosen != "torch":
        functions["torch"] = planar("torch")
    exact_weight = weight.detach().double().requires_grad_()
    exact = step(lambda w: published(w, side), exact_weight, complex_grad.to(torch.complex128))
    exact = (torch.stack([exact[0].real, exact[0].imag], dim=1), exact[1])
    for name, function in functions.items():
        for ours, theirs in zip(step(function, weight, grad), exact, strict=True):
            assert (ours.double() - theirs).norm() < 1e-5 * theirs.norm(), name

    def run(function: Callable[[Tensor], Tensor], grad: Tensor) -> Callable[[], object]:
        return lambda: step(function, weight, grad)

    variants = {name: run(function, grad) for name, function in functions.items()}
    variants["published"] = run(lambda w: published(w, side), complex_grad)
    if full:
        compiled = torch.compile(published, dynamic=False)
        variants["published, compiled"] = run(lambda w: compiled(w, side), complex_grad)
    # multiply-adds of real numbers: 4 n^3 to invert a complex matrix, 8 n^3 for the two products
    products = 12 * len(matrices) * channels**3
    ratios = compare(variants, flops=2 * products)
    megabytes = {
        "ours": saved_bytes(lambda: functions[chosen](weight), weight) / 1e6,
        "published": saved_bytes(lambda: published(weight, side), weight) / 1e6,
    }
    gigaflops = 2e-6 * products / benchmark.extra_info["median_ms"][chosen]
    benchmark.extra_info["saved_megabytes"] = {k: round(v, 3) for k, v in megabytes.items()}
    benchmark.extra_info["gflops"] = round(gigaflops, 1)
    kept = ", ".join(f"{name} {value:.2f} MB" for name, value in megabytes.items())
    print(f"{gigaflops:.0f} GFLOP/s; saved for backward: {kept}")
    if not GPU:
        benchmark.extra_info["target"] = TARGET
        print(f"target {TARGET}x, reached {ratios['published']:.2f}x")
