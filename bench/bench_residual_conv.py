"""residual_conv, forward and backward: against the published form and two plain convolutions."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lipfast
from lipfast import backends, reference
from lipfast.nn import SLLConv2d
from lipfast.ops import residual_conv
from lipfast.saved import saved_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 256 if torch.cuda.is_available() else 32
# Maps of the paper's networks: (channels, side).
SHAPES = [(16, 32), (64, 16), (128, 8), (256, 8)]
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def make_inputs(channels: int, side: int, memory_format: torch.memory_format) -> list[Tensor]:
    """x, a kernel with norm near 1, bias and scale; with gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, channels, side, side, generator=generator)
    kernel = torch.randn(channels, channels, 3, 3, generator=generator) / (6 * channels**0.5)
    bias, scale = torch.rand(2, channels, generator=generator)
    tensors = [x.contiguous(memory_format=memory_format), kernel, bias, scale]
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def plain_pair(x: Tensor, kernel: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """The two convolutions alone: what two layers nn.Conv2d compute."""
    return F.conv2d(F.conv2d(x, kernel, bias, padding=1), kernel, scale, padding=1)


def step(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Value and gradients."""
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, inputs, grad)]


def worst_error(values: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of a value or gradient."""
    pairs = zip(values, exact, strict=True)
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs)


def published(x: Tensor, kernel: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return reference.residual_conv(x, kernel, bias, scale, "zeros")


def ours(x: Tensor, kernel: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return residual_conv(x, kernel, bias, scale, "zeros", backend="torch")


def fused(x: Tensor, kernel: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return residual_conv(x, kernel, bias, scale, "zeros", backend="triton")


def saved_inputs(function: Callable[[], Tensor], x: Tensor, *known: Tensor) -> float:
    """What a forward pass keeps for its backward pass, without `known`, in units of x."""
    return saved_bytes(function, *known) / x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("channels", "side"), SHAPES)
def bench_residual_conv(compare, benchmark, channels, side, memory_format, dtype, full):
    inputs = make_inputs(channels, side, FORMATS[memory_format])
    grad = torch.randn(inputs[0].shape, device=DEVICE).contiguous(
        memory_format=FORMATS[memory_format]
    )
    functions = {"torch": ours, "published": published, "plain pair": plain_pair}
    if backends.choose("residual_conv", *inputs) == "reference":  # on a CPU, for its speed
        functions = {"published": published, "torch": ours, "plain pair": plain_pair}
    if backends.why_not("residual_conv", "triton", *inputs) is None:
        functions["triton"] = fused
    if full:
        functions["published, compiled"] = torch.compile(published, dynamic=False)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = step(published, wide, grad.double())

    def run(function: Callable[..., Tensor]) -> Callable[[], object]:
        def call() -> list[Tensor]:
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return step(function, inputs, grad)

        return call

    allowed = 2 * worst_error(run(published)(), exact) + 1e-6
    for name in {"torch", "triton"} & functions.keys():
        assert worst_error(run(functions[name])(), exact) < allowed, name
    saved = {
        name: round(saved_inputs(lambda: f(*inputs), inputs[0], *inputs[1:]), 3)  # noqa: B023
        for name, f in functions.items()
    }
    benchmark.extra_info["saved_inputs"] = saved
    compare(
        {name: run(function) for name, function in functions.items()},
        flops=6 * 2 * inputs[0].numel() * channels * 9,
        precision="bf16" if dtype == torch.bfloat16 else "fp32",
    )
    print(f"saved for backward, in inputs: {saved}")


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("channels", "side"), SHAPES)
def bench_sll_layer(compare, benchmark, channels, side, memory_format):
    """A whole layer with its weight construction, against its published form and nn.Conv2d."""
    x = make_inputs(channels, side, FORMATS[memory_format])[0]
    torch.manual_seed(0)
    layer = SLLConv2d(channels, channels, 3, device=DEVICE)
    pair = nn.Sequential(*(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)))
    pair.to(DEVICE)
    grad = torch.randn_like(x)

    def run(module: nn.Module, backend: str | None) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            with lipfast.backend(backend):
                y = module(x)
                return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]

        return call

    def forward(backend: str | None) -> Tensor:
        with lipfast.backend(backend):
            return layer(x)

    for a, b in zip(run(layer, "reference")(), run(layer, None)(), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-3, atol=2e-3 * float(a.detach().abs().max()))
    saved = {
        name: round(saved_inputs(lambda: forward(backend), x, *layer.parameters()), 3)  # noqa: B023
        for name, backend in [("ours", None), ("published", "reference")]
    }
    # on a CPU the published form is chosen, for its speed
    assert DEVICE == "cpu" or saved["ours"] <= 1.1 or x.nbytes < 16 * layer.weight.nbytes
    benchmark.extra_info["saved_inputs"] = saved
    compare(
        {
            "ours": run(layer, None),
            "published": run(layer, "reference"),
            "plain pair": run(pair, None),
        }
    )
    print(f"saved for backward, in inputs: {saved}")
