"""LOT, BCOP and Cayley against their definitions in float64, and under backend("reference")."""

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast import nn as lnn
from lipfast import ops, reference

F64 = torch.float64
SHAPES = [(4, 4), (3, 5), (5, 3)]
SIZES = [(4, 6), (5, 3), (1, 2)]


def drifted(layer: lnn.LipschitzModule, noise: float = 0.02) -> lnn.LipschitzModule:
    """The layer some steps after its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.add_(noise * step.to(parameter.dtype))
    return layer


def polar_by_svd(matrix: Tensor, ridge: float = 0.0) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u * (s / (s**2 + ridge).sqrt())[..., None, :]) @ vh


def full_plane_conv(x: Tensor, kernel: Tensor, matrix_function) -> Tensor:
    """Circular convolution with f(V) at every frequency of the complex Fourier transform."""
    out, channels, kh, kw = kernel.shape
    h, w = x.shape[-2:]
    taps = kernel.new_zeros(out, channels, h, w)
    for i in range(kh):
        for j in range(kw):
            position = ((kh - 1) // 2 - i) % h, ((kw - 1) // 2 - j) % w
            taps[:, :, position[0], position[1]] += kernel[:, :, i, j]
    matrices = matrix_function(torch.fft.fft2(taps).permute(2, 3, 0, 1))
    x_hat = torch.fft.fft2(x).permute(2, 3, 1, 0)
    return torch.fft.ifft2((matrices @ x_hat).permute(3, 2, 0, 1)).real


def padded_full_plane_conv(x: Tensor, layer: lnn.LOTConv2d, kernel: Tensor, f) -> Tensor:
    ph, pw = layer._padding()
    y = full_plane_conv(torch.nn.functional.pad(x, (pw, pw, ph, ph)), kernel, f)
    h, w = x.shape[-2:]
    return y[..., ph : ph + h, pw : pw + w]


def value_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    y = function(*inputs)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    return [y, *torch.autograd.grad(y, inputs, direction.to(y.dtype))]


def assert_near(ours: list[Tensor], exact: list[Tensor], tolerances: list[float]) -> None:
    for a, b, tolerance in zip(ours, exact, tolerances, strict=True):
        assert float((a.double() - b).norm().detach()) <= tolerance * float(b.norm().detach())


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", SHAPES)
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_lot_is_the_polar_factor_of_each_transfer_matrix(channels, size, padding_mode, ridge):
    for dtype, tolerances in [(torch.float32, [1e-5, 1e-5, 1e-3]), (F64, [1e-11, 1e-11, 1e-8])]:
        layer = drifted(
            lnn.LOTConv2d(
                *channels, 3, padding_mode=padding_mode, bias=False, dtype=dtype, ridge=ridge
            )
        )
        x = torch.randn(2, channels[0], *size, dtype=F64, requires_grad=True)
        kernel = layer.weight.detach().double().requires_grad_()

        def exact(x: Tensor, kernel: Tensor, layer=layer) -> Tensor:
            return padded_full_plane_conv(x, layer, kernel, lambda v: polar_by_svd(v, ridge))

        inputs = x.detach().to(dtype).requires_grad_(), layer.weight
        ours = value_and_gradients(lambda x, _, layer=layer: layer(x), *inputs)
        assert_near(ours, value_and_gradients(exact, x, kernel), tolerances)
        evaluated = padded_full_plane_conv(
            x, layer, kernel, lambda v: reference.contract(polar_by_svd(v, ridge))[0]
        )
        assert_near([layer.eval()(inputs[0])], [evaluated], tolerances[:1])


@pytest.mark.parametrize("channels", SHAPES)
def test_cayley_is_the_published_transform_of_each_transfer_matrix(channels):
    layer = drifted(lnn.CayleyConv2d(*channels, 3, bias=False, dtype=F64), 0.2)
    for size in SIZES:
        x = torch.randn(2, channels[0], *size, dtype=F64, requires_grad=True)

        def published(x: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
            return full_plane_conv(x, weight * (alpha / weight.norm()), reference.cayley)

        inputs = x, layer.weight, layer.alpha
        ours = value_and_gradients(lambda x, *_: layer(x), *inputs)
        assert_near(ours, value_and_gradients(published, *inputs), [1e-12] * 4)


@pytest.mark.parametrize("channels", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_bcop_composes_polar_factors(channels, k):
    layer = drifted(lnn.BCOPConv2d(*channels, k, bias=False, dtype=F64), 0.05)
    rows, c = min(channels), max(channels)

    def published(weight: Tensor) -> Tensor:
        matrices = polar_by_svd(weight)
        half = matrices[1:, :, : c // 2]
        kernel = reference.block_conv(matrices[0, :rows], half @ half.mT)
        return kernel if channels[0] >= channels[1] else reference.transpose_kernel(kernel)

    ours = value_and_gradients(lambda _: layer._training_weights((1, 1))[0], layer.weight)
    assert_near(ours, value_and_gradients(published, layer.weight), [1e-11, 1e-8])


@pytest.mark.parametrize("features", SHAPES)
@pytest.mark.parametrize("kind", [lnn.LOTLinear, lnn.BjorckLinear])
def test_linear_layers_and_kernels_of_one_tap_are_one_polar_factor(kind, features):
    layer = drifted(kind(*features, bias=False, dtype=F64), 0.1)
    x = torch.randn(7, features[0], dtype=F64, requires_grad=True)
    ours = value_and_gradients(lambda x, _: layer(x), x, layer.weight)
    exact = value_and_gradients(lambda x, w: x @ polar_by_svd(w).mT, x, layer.weight)
    assert_near(ours, exact, [1e-11, 1e-11, 1e-8])
    if kind is lnn.LOTLinear:
        conv = lnn.LOTConv2d(*features, 1, bias=False, dtype=F64)
        with torch.no_grad():
            conv.weight.copy_(layer.weight[:, :, None, None])
        (weight,) = conv._training_weights((4, 4))
        torch.testing.assert_close(weight, layer._training_weights((1, 1))[0])


def test_bjorck_linear_is_the_linear_layer_of_bcop():
    assert lnn.BCOPLinear is lnn.BjorckLinear is lnn.METHODS["bcop"].linear
    assert repr(lnn.BjorckLinear(3, 4)) == "BjorckLinear(3, 4, bias=True)"


@pytest.mark.parametrize("training", [True, False])
def test_backend_reference_is_the_published_layer(training):
    x = torch.randn(2, 4, 4, 5, dtype=F64)

    def sound(matrices: Tensor) -> Tensor:
        return matrices if training else reference.contract(matrices)[0]

    lot = drifted(lnn.LOTConv2d(4, 4, 3, padding_mode="circular", bias=False, dtype=F64), 0.1)
    cayley = drifted(lnn.CayleyConv2d(4, 4, 3, bias=False, dtype=F64))
    bcop = drifted(lnn.BCOPConv2d(4, 4, 3, bias=False, dtype=F64), 0.1)
    spectrum = reference.kernel_spectrum(lot.weight, (4, 5))
    expected = {
        lot: reference.polar(spectrum, iterations=10, ridge=1e-4),
        cayley: reference.cayley(
            reference.kernel_spectrum(cayley.weight * cayley.alpha / cayley.weight.norm(), (4, 5))
        ),
    }
    with lipfast.backend("reference"), torch.no_grad():
        for layer, matrices in expected.items():
            y = reference.fourier_conv(x, sound(matrices))
            torch.testing.assert_close(layer.train(training)(x), y, rtol=1e-10, atol=1e-10)
        norms = reference.schatten_bound(bcop.weight)[:, None, None]
        matrices = sound(reference.bjorck(bcop.weight / norms, iterations=20))
        half = matrices[1:, :, :2]
        kernel = reference.block_conv(matrices[0], half @ half.mT)
        (ours,) = bcop.train(training)._weights((4, 5), x)
        torch.testing.assert_close(ours, kernel, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("noise", [0.02, 0.05])
@pytest.mark.parametrize("channels", [(16, 16), (16, 8), (64, 64)])
def test_ridge_gives_the_outputs_of_published_checkpoints(channels, noise):
    published = drifted(lnn.LOTConv2d(*channels, 3), noise if channels[0] < 64 else 0.02)
    x = torch.randn(4, channels[0], 8, 8)
    with lipfast.backend("reference"):
        expected = published(x), published.eval()(x)
    layer = lnn.LOTConv2d(*channels, 3, ridge=1e-4)
    layer.load_state_dict(published.state_dict())
    for y, exact in zip((layer(x), layer.eval()(x)), expected, strict=True):
        assert float((y - exact).norm().detach()) <= 1e-4 * float(exact.norm().detach())


def test_ridge_is_a_finite_number():
    for wrong in (-1e-4, float("nan"), float("inf"), "1e-4", True, None):
        for make in (
            lambda: lnn.LOTConv2d(4, 4, 3, ridge=wrong),  # noqa: B023
            lambda: lnn.LOTLinear(4, 4, ridge=wrong),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"ridge: LOT.* expected a finite number >= 0"):
                make()
    assert "ridge=0.0001" in repr(lnn.LOTConv2d(4, 4, 3, ridge=1e-4))
    assert "ridge" not in repr(lnn.LOTLinear(4, 4))


@pytest.mark.parametrize("method", ["lot", "bcop", "cayley"])
def test_evaluation_is_built_in_float64_whatever_backend_is_forced(method, monkeypatch):
    seen = []
    for name in ("polar", "cayley", "block_conv"):
        op = getattr(ops, name)

        def record(x, *args, op=op, **options):
            seen.append((x.dtype, options["backend"]))
            return op(x, *args, **options)

        monkeypatch.setattr(ops, name, record)
    layer = lnn.METHODS[method].conv(4, 4, 3).eval()
    for forced in ("triton", "cuda", None):
        with lipfast.backend(forced):
            assert layer.lipschitz_bound((5, 4)) <= 1 + 1e-6
        layer.eval()
    assert set(seen) == {(F64, "torch")}


@pytest.mark.parametrize("method", ["lot", "bcop", "cayley"])
@pytest.mark.parametrize("training", [True, False])
def test_jacobians_by_torch_func(method, training):
    layer = lnn.METHODS[method].conv(3, 3, 3, bias=False, dtype=F64).train(training)
    x = torch.randn(1, 3, 4, 4, dtype=F64)
    jacobian = torch.func.jacrev(layer)(x).reshape(48, 48)
    torch.testing.assert_close((jacobian @ x.flatten()).view_as(x), layer(x))
