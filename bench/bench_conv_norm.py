"""conv_norm: all norms of network M in a training step, and what the bounds cost and exceed."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipfast.models import ConvNet
from lipfast.nn import CPLConv2d, CPLLinear
from lipfast.ops import conv_norm, conv_norm_bound, conv_norm_map_bound
from lipfast.reference import power_iteration, skew_kernel

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BATCH = 256 if GPU else 32
SHARE = 0.1  # of a training step that all norms of a network may take
CHANNELS = [16, 64, 256, 512] if GPU else [16, 64, 128]


def norm_and_gradient(norm: Callable[[Tensor], Tensor], kernel: Tensor) -> tuple[Tensor, Tensor]:
    kernel = kernel.detach().requires_grad_()
    value = norm(kernel)
    return value, torch.autograd.grad(value.sum(), kernel)[0]


def layers_of(model: ConvNet) -> list[tuple[Tensor, Tensor]]:
    """The kernel of each CPL layer, and its start vector on the map that it sees."""
    sizes: dict[torch.nn.Module, tuple[int, ...]] = {}
    kinds = (CPLConv2d, CPLLinear)
    layers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    hooks = [
        layer.register_forward_hook(lambda layer, x, y: sizes.update({layer: x[0].shape[2:]}))
        for layer in layers
    ]
    with torch.no_grad():
        model(torch.zeros(2, 3, 32, 32, device=DEVICE))
    for hook in hooks:
        hook.remove()
    pairs = []
    for layer in layers:
        kernel = layer.weight.detach()
        h, w = sizes[layer] or (1, 1)
        pairs.append(
            (
                kernel if kernel.dim() == 4 else kernel[:, :, None, None],
                torch.randn(1, kernel.shape[1], h, w, device=DEVICE),
            )
        )
    return pairs


def bench_conv_norm_of_network_m(compare, benchmark):
    """27 layers: one call for each, or one for all layers of a shape, and a whole CPL step."""
    torch.manual_seed(0)
    model = ConvNet("cpl", "M", device=DEVICE)
    pairs = layers_of(model)
    assert len(pairs) == 27
    shapes = Counter((kernel.shape, vector.shape) for kernel, vector in pairs)
    groups = [
        tuple(
            torch.stack([pair[i] for pair in pairs if (pair[0].shape, pair[1].shape) == shape])
            for i in (0, 1)
        )
        for shape in shapes
    ]

    def each() -> list[tuple[Tensor, Tensor]]:
        return [norm_and_gradient(lambda k, v=v: conv_norm(k, v, "zeros")[0], k) for k, v in pairs]

    def grouped() -> list[tuple[Tensor, Tensor]]:
        return [
            norm_and_gradient(lambda k, v=v: conv_norm(k, v[:, 0], "zeros")[0], k)
            for k, v in groups
        ]

    def published() -> list[tuple[Tensor, Tensor]]:
        return [
            norm_and_gradient(lambda k, v=v: power_iteration(k, v, "zeros")[0], k) for k, v in pairs
        ]

    ours, theirs, together = each(), published(), grouped()
    for (kernel, _), (norm, grad), (power, _) in zip(pairs, ours, theirs, strict=True):
        assert norm > power * (1 - 1e-5)  # of all vectors in a plane ours takes the best
        assert abs((grad * kernel).sum() - norm) < 1e-4 * norm  # homogeneous of degree 1
    values = torch.cat([value for value, _ in together]).sort().values
    torch.testing.assert_close(values, torch.stack([value for value, _ in ours]).sort().values)
    x = torch.randn(BATCH, 3, 32, 32, device=DEVICE)

    def step() -> None:
        model(x).square().sum().backward()

    variants = {"each layer": each, "each shape": grouped, "published": published, "step": step}
    ratios = compare(variants, warmup=1)
    share = 1 / ratios["step"]
    benchmark.extra_info["share of the step"] = round(share, 4)
    print(f"27 norms take {share:.1%} of a training step, target at most {SHARE:.0%}")


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("family", ["random", "skew"])
def bench_conv_norm_bound(compare, benchmark, channels, family):
    """Time of bound and gradient, and the bound over the norm on a torus of 16 x 16."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(channels, channels, 3, 3, generator=generator).to(DEVICE)
    skew = family == "skew"
    kernel = skew_kernel(kernel) if skew else kernel
    norm = float(conv_norm_map_bound(kernel, (16, 16), "circular"))
    functions: dict[str, Callable[[Tensor], Tensor]] = {}
    for method in ("unfolding", "frequency", "gram"):
        for backend in (None, "reference"):
            name = method if backend is None else f"{method}, published"
            functions[name] = lambda k, method=method, backend=backend: conv_norm_bound(
                k, method=method, skew=skew, backend=backend
            )
    tightness = {}
    for name, function in functions.items():
        value, grad = norm_and_gradient(function, kernel)
        assert float(value) >= norm * (1 - 2e-4)
        # the bound is homogeneous of degree 1 in the kernel
        assert abs(float((grad * kernel).sum() / value) - 1) < 1e-3
        tightness[name] = round(float(value) / norm, 3)
    benchmark.extra_info["over the norm"] = tightness
    print(f"\nover the norm: {tightness}")
    variants = {
        name: lambda function=function: norm_and_gradient(function, kernel)
        for name, function in functions.items()
    }
    compare(variants, rounds=5, warmup=1)


@pytest.mark.parametrize(
    ("channels", "side", "padding_mode"),
    [(16, 8, "zeros"), (32, 16, "zeros"), (64, 8, "zeros"), (64, 16, "circular")],
)
def bench_conv_norm_map_bound(benchmark, channels, side, padding_mode):
    """The bound of evaluation, once for a layer and a map."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(channels, channels, 3, 3, generator=generator).to(DEVICE)
    vector = torch.randn(1, channels, side, side, dtype=torch.float64, generator=generator)
    estimate, _ = conv_norm(kernel.double(), vector.to(DEVICE), padding_mode, steps=500)
    bound = benchmark.pedantic(
        lambda: conv_norm_map_bound(kernel, (side, side), padding_mode), rounds=1
    )
    ratio = float(bound / estimate)
    assert 1 < ratio < 1.002
    benchmark.extra_info["over an estimate"] = round(ratio, 6)
    # without variants to compare, the table of `lipfast report` shows this one alone
    milliseconds = round(benchmark.stats.stats.median * 1e3, 4)
    benchmark.extra_info.update(median_ms={"bound": milliseconds}, ratio={})
    print(f"\n{milliseconds:.0f} ms, at most {ratio:.6f} times the norm")
