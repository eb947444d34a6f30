"""gram_bound, forward and backward: against the published form, and in the work of its products."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import gram_bound
from lipfast.reference.gram_bound import gram_bound as published

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TARGETS = {16: 1.0, 64: 1.3, 128: 1.8, 256: 2.3}  # on a CPU, times the speed of the published form
CHANNELS = [64, 256, 512, 1024] if GPU else [16, 32, 48, 64, 128, 256]


def step(function: Callable[[Tensor], Tensor], weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Value and gradient."""
    weight = weight.detach().requires_grad_()
    r = function(weight)
    return r, torch.autograd.grad(r, weight, grad)[0]


@pytest.fixture(params=["ieee", "tf32"] if GPU else ["ieee"])
def precision(request):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if request.param == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("channels", CHANNELS)
def bench_gram_bound(compare, channels, precision, benchmark, full):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, generator=generator).to(DEVICE)
    grad = torch.rand(channels, generator=generator).to(DEVICE)
    chosen = backends.choose("gram_bound", weight)
    functions: dict[str, Callable[[Tensor], Tensor]] = {chosen: gram_bound}
    for name in ("triton", "cuda", "cpp", "torch"):
        if name != chosen and backends.why_not("gram_bound", name, weight) is None:
            functions[name] = lambda weight, name=name: gram_bound(weight, backend=name)
    functions["published"] = published
    if full:
        functions["published, compiled"] = torch.compile(published, dynamic=False)
    exact = step(published, weight.double(), grad.double())
    for name, function in functions.items():
        for ours, theirs in zip(step(function, weight, grad), exact, strict=True):
            error = (ours.double() - theirs).norm() / theirs.norm()
            # Where a correlation is nearly 0 its sign, and so a part of the gradient, may turn.
            assert error < (2e-2 if precision == "tf32" else 1e-3), name

    def run(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: step(function, weight, grad)

    variants = {name: run(function) for name, function in functions.items()}
    ratios = compare(
        variants,
        flops=2 * 126 * channels**3,
        precision="tf32" if precision == "tf32" else "fp32",
    )
    seconds = benchmark.extra_info["median_ms"][chosen] / 1e3
    flops = 2 * (45 + 81) * channels**3 / seconds
    benchmark.extra_info["tflops"] = round(flops / 1e12, 4)
    print(f"{flops / 1e12:.3f} TFLOP/s, counting 126 c^3 multiply-adds")
    if not GPU and channels in TARGETS:
        benchmark.extra_info["target"] = TARGETS[channels]
        print(f"target {TARGETS[channels]}x, reached {ratios['published']:.2f}x")
    if GPU:
        megabytes = extra_memory(variants[chosen]) / 1e6
        benchmark.extra_info["extra_megabytes"] = round(megabytes, 2)
        print(f"{megabytes:.1f} MB at the peak beyond what the step returns")


def extra_memory(function: Callable[[], object]) -> int:
    """Bytes allocated at the peak of one step, beyond what it starts with and returns."""
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = function()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - start
    del results
    return torch.cuda.max_memory_allocated() - start - kept
