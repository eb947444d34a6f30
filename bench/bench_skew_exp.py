"""skew_exp and SOC layers: training, inference and saved bytes, against the published form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast import reference
from lipfast.nn import SOCConv2d
from lipfast.ops import skew_exp
from lipfast.saved import saved_bytes

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH = 256 if GPU else 32
SHAPES = [(16, 32), (32, 16), (64, 8), (128, 4)]  # of the paper's networks: (channels, side)
PUBLISHED = {"series": "taylor", "norm": "unfolding"}
TAYLOR = reference.taylor_coefficients(5)


def make_inputs(channels: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, a skew kernel of norm at most 2.1, and a gradient."""
    torch.manual_seed(0)
    kernel = reference.skew_kernel(torch.randn(channels, channels, 3, 3))
    kernel = kernel * (2.1 / reference.unfolding_bound(kernel, skew=True))
    x, grad = (torch.randn(BATCH, channels, side, side, device=DEVICE) for _ in range(2))
    return x.requires_grad_(), kernel.to(DEVICE).requires_grad_(), grad


def worst_error(values: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a value or gradient."""
    pairs = zip(values, exact, strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


def saved_inputs(function: Callable[[], Tensor], x: Tensor) -> float:
    """What a forward pass keeps for its backward pass, in units of x."""
    return saved_bytes(function) / x.nbytes


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(("channels", "side"), SHAPES)
def bench_skew_exp(compare, benchmark, channels, side, padding_mode, full):
    """Forward and backward with the five published terms."""
    x, kernel, grad = make_inputs(channels, side)

    def run(**options) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            y = skew_exp(x, kernel, TAYLOR, padding_mode, **options)
            return [y, *torch.autograd.grad(y, [x, kernel], grad)]

        return call

    variants = {
        "terms": run(save="terms"),
        "published": run(backend="reference"),
        "input": run(save="input"),
    }
    if full:
        compiled = torch.compile(reference.skew_exp, dynamic=False)

        def compiled_step() -> list[Tensor]:
            y = compiled(x, kernel, 5, padding_mode)
            return [y, *torch.autograd.grad(y, [x, kernel], grad)]

        variants["published, compiled"] = compiled_step
    wide = [t.detach().double().requires_grad_() for t in (x, kernel)]
    y = reference.skew_exp(*wide, 5, padding_mode)
    exact = [y, *torch.autograd.grad(y, wide, grad.double())]
    errors = [worst_error(function(), exact) for function in variants.values()]
    # of the published form; one weight gradient over all terms sums n times as many products
    assert max(errors) < 2 * errors[1] + 1e-5
    compare(variants, rounds=9, warmup=2, flops=15 * 2 * x.numel() * channels * 9)


@pytest.mark.parametrize(("channels", "side"), SHAPES)
def bench_soc_training(compare, benchmark, channels, side):
    """A whole layer with its weights: as it is by default, and as published."""
    x, _, grad = make_inputs(channels, side)
    layers = {
        "default": SOCConv2d(channels, channels, 3, bias=False, device=DEVICE),
        "published": SOCConv2d(channels, channels, 3, bias=False, device=DEVICE, **PUBLISHED),
        "input": SOCConv2d(channels, channels, 3, bias=False, device=DEVICE, save="input"),
    }

    def run(name: str) -> Callable[[], list[Tensor]]:
        layer, backend = layers[name], "reference" if name == "published" else None

        def call() -> list[Tensor]:
            with lipfast.backend(backend):
                y = layer(x)
                return [y, *torch.autograd.grad(y, [x, layer.weight], grad)]

        return call

    layers["input"].load_state_dict(layers["default"].state_dict())
    assert worst_error(run("input")(), run("default")()) < 1e-5
    saved = {name: round(saved_inputs(lambda: layer(x), x), 2) for name, layer in layers.items()}  # noqa: B023
    benchmark.extra_info["saved_inputs"] = saved
    compare({name: run(name) for name in layers}, rounds=9, warmup=2)
    print(f"saved for backward, in inputs: {saved}")


@pytest.mark.parametrize(("channels", "side"), SHAPES)
def bench_soc_inference(compare, benchmark, channels, side):
    """6 terms that are at least as orthogonal against the 12 published ones."""
    x = make_inputs(channels, side)[0].detach()
    layers = {
        "6 terms": SOCConv2d(channels, channels, 3, bias=False, device=DEVICE, terms=6),
        "5 terms": SOCConv2d(channels, channels, 3, bias=False, device=DEVICE),
        "published": SOCConv2d(channels, channels, 3, bias=False, device=DEVICE, **PUBLISHED),
    }
    defects = {name: defect(layer.eval()) for name, layer in layers.items()}
    assert defects["6 terms"] <= 1e-6
    benchmark.extra_info["defect"] = defects

    def run(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad(), lipfast.backend("reference" if name == "published" else None):
                return layers[name](x)

        return call

    compare({name: run(name) for name in layers}, rounds=9, warmup=2)
    print(f"largest distance of a squared singular value from 1: {defects}")


def defect(layer: SOCConv2d) -> float:
    """Largest distance of p(L)^T p(L) from the identity along the series' interval."""
    coefficients = layer._eval_coefficients
    t = torch.linspace(0, layer._norm_limit, 10_001, dtype=torch.float64)
    values = sum(a * (1j * t) ** k for k, a in enumerate(coefficients))
    return float((1 - values.abs() ** 2).abs().max())
