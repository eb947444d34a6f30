"""aol_rescale, forward and backward: against scaling, cast and layout one after another."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import aol_rescale

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CHANNELS = [64, 256, 512, 1024] if GPU else [16, 64, 256]


def step(
    function: Callable[[Tensor, Tensor], Tensor], weight: Tensor, r: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Value and gradients."""
    weight, r = weight.detach().requires_grad_(), r.detach().requires_grad_()
    out = function(weight, r)
    return out, *torch.autograd.grad(out, (weight, r), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("channels", CHANNELS)
def bench_aol_rescale(compare, channels, dtype, benchmark):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, generator=generator).to(DEVICE)
    r = (torch.rand(channels, generator=generator) + 0.5).to(DEVICE)
    grad = torch.randn(channels, channels, 3, 3, generator=generator).to(DEVICE, dtype)
    grad = grad.to(memory_format=torch.channels_last)
    chosen = backends.choose("aol_rescale", weight, dtype)
    names = [chosen, *(name for name in ("triton", "cuda", "cpp", "torch") if name != chosen)]
    functions = {
        name: lambda weight, r, name=name: aol_rescale(
            weight, r, dtype=dtype, channels_last=True, backend=name
        )
        for name in names
        if backends.why_not("aol_rescale", name, weight, dtype) is None
    }
    functions["one by one"] = lambda weight, r: (weight * (r**-0.5)[:, None, None]).to(
        dtype, memory_format=torch.channels_last
    )
    exact = step(functions["one by one"], weight.double(), r.double(), grad.double())
    for name, function in functions.items():
        for ours, theirs in zip(step(function, weight, r, grad), exact, strict=True):
            error = (ours.double() - theirs).norm() / theirs.norm()
            # the exact value was rounded to dtype, too
            assert error < torch.finfo(dtype).eps + 1e-5, name
    variants = {
        name: lambda function=function: step(function, weight, r, grad)
        for name, function in functions.items()
    }
    compare(variants)
    # weight, r and the kernel in one direction; its gradient, weight and dL/dweight in the other
    traffic = weight.numel() * (3 * weight.itemsize + 2 * dtype.itemsize)
    rate = traffic / benchmark.extra_info["median_ms"][chosen] / 1e6
    benchmark.extra_info["gigabytes_per_second"] = round(rate, 2)
    print(f"{rate:.1f} GB/s of the numbers that must move")
