"""polar, forward and backward: against the published iterations, in time, work and memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lipfast import backends
from lipfast.ops import polar, polar_gemm
from lipfast.ops.polar_schedules import coefficients
from lipfast.saved import saved_bytes

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# channels and height of the (padded) map: LOT needs one matrix for each frequency of its half plane
LOT = (
    [(64, 34), (128, 18), (256, 10), (512, 10)] if GPU else [(16, 34), (32, 18), (64, 10), (128, 6)]
)
BCOP = [64, 256, 1024] if GPU else [16, 64, 128, 256]
COMPILED = 32  # compiling the published iteration takes long: in one case only


def step(
    function: Callable[[Tensor], Tensor], matrix: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    matrix = matrix.detach().requires_grad_()
    w = function(matrix)
    return w.detach(), torch.autograd.grad(w, matrix, grad)[0]


@pytest.mark.parametrize(("channels", "size"), LOT)
def bench_polar_of_lot(compare, channels, size, benchmark):
    """Identity + noise 0.02 (for 16 channels, of the same norm for others) at each frequency."""
    generator = torch.Generator().manual_seed(0)
    noise = 3 * 0.02 * (16 / channels / 2) ** 0.5
    shape = (size * (size // 2 + 1), 2, channels, channels)
    matrix = noise * torch.randn(shape, generator=generator)
    matrix[:, 0] += torch.eye(channels)
    run(compare, benchmark, matrix, {"planar": True}, channels == COMPILED)
    ratio = benchmark.extra_info["flops"]["published"] / benchmark.extra_info["flops"]["ours"]
    benchmark.extra_info["whole_plane"] = whole = round(ratio * size**2 / len(matrix), 2)
    print(f"the published layer, at the frequencies of both half planes, {whole}x the products")


@pytest.mark.parametrize("channels", BCOP)
def bench_polar_of_bcop(compare, channels, benchmark):
    """The five matrices of a 3x3 kernel."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, channels, channels, generator=generator)
    q, _ = torch.linalg.qr(matrix)
    run(compare, benchmark, (q + 0.2 * matrix / channels**0.5) / channels**0.5, {"form": "bjorck"})


def run(compare, benchmark, matrix: Tensor, options: dict, with_compiled: bool = False) -> None:
    matrix = matrix.to(DEVICE)
    grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def on(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda v: polar(v, backend=backend, **options)

    chosen = backends.choose("polar", matrix)
    names = [chosen]
    for name in ("triton", "cuda", "torch"):
        if name != chosen and backends.why_not("polar", name, matrix) is None:
            names.append(name)
    functions = {name: on(name) for name in names}
    functions["published"] = on("reference")
    if with_compiled:
        functions["published, compiled"] = torch.compile(on("reference"))
    exact = step(on("torch"), matrix.double(), grad.double())
    for name, function in functions.items():
        w, gradient = step(function, matrix, grad)
        ours = "published" not in name
        for value, true, bound in zip((w, gradient), exact, (2e-5, 1e-3), strict=True):
            error = (value.double() - true).norm() / true.norm()
            assert error < (bound if ours else 10 * bound), (name, error)
        values = as_matrices(w.double(), options)
        excess = torch.linalg.matrix_norm(values, 2).amax().item() - 1
        assert excess < (1e-6 if ours else 1e-5), (name, excess)
    variants = {
        name: lambda function=function: step(function, matrix, grad)
        for name, function in functions.items()
    }
    planar = bool(options.get("planar"))
    work = {
        "ours": work_of_ours(matrix, planar),
        "published": work_of_published(on("reference"), matrix, planar),
    }
    compare(variants, rounds=7, warmup=1, flops=work["ours"])
    kept = {"ours": saved(on("torch"), matrix), "published": saved(on("reference"), matrix)}
    benchmark.extra_info["flops"] = work
    benchmark.extra_info["saved_bytes"] = kept
    print(
        f"products {work['ours'] / 1e9:.2f} Gflop, "
        f"published {work['published'] / work['ours']:.1f}x; "
        f"kept {kept['ours'] / 2**20:.2f} MiB, published {kept['published'] / kept['ours']:.1f}x"
    )


def as_matrices(w: Tensor, options: dict) -> Tensor:
    return torch.complex(*w.unbind(-3)) if options.get("planar") else w


def work_of_ours(matrix: Tensor, planar: bool) -> int:
    """Floating-point operations of the products of one step."""
    x = matrix if planar else matrix[:, None]
    table = coefficients("535nn")
    with FlopCounterMode(display=False) as counter:
        w, _ = polar_gemm.polar_forward(x, table)
        polar_gemm.polar_backward(x, x, w, 8)
    return counter.get_total_flops()


def work_of_published(function: Callable[[Tensor], Tensor], matrix: Tensor, planar: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        step(function, matrix, matrix)
    return counter.get_total_flops() * (4 if planar else 1)  # it counts complex ones as real


def saved(function: Callable[[Tensor], Tensor], matrix: Tensor) -> int:
    """Bytes kept for the backward pass beyond the matrix itself."""
    matrix = matrix.detach().requires_grad_()
    return saved_bytes(lambda: function(matrix), matrix)
