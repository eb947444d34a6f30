"""maxmin, forward and backward: against the published form, its compilation, and plain copies."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import maxmin
from lipfast.reference.maxmin import maxmin as published

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The first is the size of the CPU target; the others are maps of the paper's networks.
SHAPES = [(32, 64, 32, 32), (256, 16, 32, 32), (256, 128, 16, 16), (256, 1024, 2, 2)]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def step(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    x = x.detach().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, grad)[0]


def ours_on(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: maxmin(x, backend=name)


def random_without_ties(shape: tuple[int, ...]) -> Tensor:
    """Pairs in random order whose elements differ: at ties the published gradient is another."""
    generator = torch.Generator().manual_seed(0)
    middle, half = torch.randn(2, shape[0], shape[1] // 2, *shape[2:], generator=generator)
    half = half.sign() * (half.abs() + 0.25)
    return torch.stack([middle - half, middle + half], dim=2).flatten(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_maxmin(compare, shape, memory_format, dtype):
    x = (
        random_without_ties(shape)
        .to(DEVICE, dtype)
        .contiguous(memory_format=FORMATS[memory_format])
    )
    grad = torch.randn_like(x)
    names = [
        name for name in ("cpp", "triton", "cuda") if backends.why_not("maxmin", name, x) is None
    ]
    chosen = backends.choose("maxmin", x)
    functions = {chosen: maxmin}
    functions |= {name: ours_on(name) for name in names if name != chosen}
    torch.compiler.reset()  # or the recompilation limit would leave later sizes uncompiled
    functions |= {"published": published, "compiled": torch.compile(published, dynamic=False)}
    expected = step(published, x, grad)
    for name, function in functions.items():
        for ours, theirs in zip(step(function, x, grad), expected, strict=True):
            assert torch.equal(ours, theirs), name

    def run(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: step(function, x, grad)

    variants = {name: run(function) for name, function in functions.items()}
    variants["copies"] = lambda: (x.clone(), grad.clone())  # the floor: each read and written once
    compare(variants, moved_bytes=4 * x.nbytes)
