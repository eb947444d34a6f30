"""fourier_conv and kernel_spectrum: values and derivatives, against sums over taps in float64."""

import pytest
import torch
from torch import Tensor

from lipfast.ops import fourier_conv, fourier_conv_dft, kernel_spectrum
from lipfast.reference import kernel_spectrum as reference_spectrum

MAPS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (4, 4), (5, 4), (4, 5), (1, 7), (8, 1), (9, 12)]
BACKENDS = ["torch", "reference"]
METHODS = {"direct": (10**9, 0), "separable": (0, 10**9), "fft": (0, 0)}


def circular_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """The sum over taps of the shifted map; tap (k - 1) // 2 stays in place."""
    kh, kw = kernel.shape[2:]
    y = 0
    for i in range(kh):
        for j in range(kw):
            shifts = ((kh - 1) // 2 - i, (kw - 1) // 2 - j)
            moved = x.roll(shifts, dims=(2, 3))
            y = y + torch.einsum("oi,nihw->nohw", kernel[:, :, i, j], moved)
    assert isinstance(y, Tensor)
    return y


def draw(
    map_size: tuple[int, int],
    *,
    batch: int = 2,
    channels: tuple[int, int] = (4, 3),
    taps: tuple[int, int] = (3, 3),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """x and kernel, which require gradients, and dL/dy."""
    generator = torch.Generator().manual_seed(0)
    out_channels, in_channels = channels
    shapes = [(batch, in_channels, *map_size), (*channels, *taps), (batch, out_channels, *map_size)]
    x, kernel, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return x.to(dtype).requires_grad_(), kernel.to(dtype).requires_grad_(), grad.to(dtype)


def any_spectrum(map_size: tuple[int, int], channels: tuple[int, int] = (4, 3)) -> Tensor:
    """Of no real kernel: imaginary parts and all."""
    frequencies = map_size[0] * (map_size[1] // 2 + 1)
    generator = torch.Generator().manual_seed(1)
    shape = (frequencies, 2, *channels)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.fixture(params=METHODS)
def method(request, monkeypatch):
    direct, separable = METHODS[request.param]
    monkeypatch.setattr(fourier_conv_dft, "_DIRECT", direct)
    monkeypatch.setattr(fourier_conv_dft, "_SEPARABLE", separable)
    return request.param


@pytest.mark.parametrize("taps", [(3, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("map_size", MAPS)
def test_is_a_circular_convolution(map_size, taps, method, poisoned_empty):
    x, kernel, grad = draw(map_size, taps=taps)
    expected = circular_convolution(x, kernel)
    y = fourier_conv(x, kernel_spectrum(kernel, map_size), backend="torch")
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    assert y.is_contiguous()
    ours = torch.autograd.grad(y, (x, kernel), grad)
    theirs = torch.autograd.grad(expected, (x, kernel), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("map_size", MAPS)
def test_takes_any_spectrum_as_the_published_form_does(map_size, method, poisoned_empty):
    x, _, grad = draw(map_size)
    spectrum = any_spectrum(map_size)
    values = []
    for backend in BACKENDS:
        y = fourier_conv(x, spectrum, backend=backend)
        values.append((y, *torch.autograd.grad(y, (x, spectrum), grad)))
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("map_size", [(113, 12), (3, 113), (12, 13), (8, 8)])
def test_methods_of_the_sizes_as_they_are(map_size):
    x, kernel, grad = draw(map_size, batch=1, channels=(2, 1))
    y = fourier_conv(x, kernel_spectrum(kernel, map_size), backend="torch")
    expected = circular_convolution(x, kernel)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, kernel), grad),
        torch.autograd.grad(expected, (x, kernel), grad),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("taps", [(3, 3), (2, 4), (7, 5)])
@pytest.mark.parametrize("map_size", MAPS)
def test_spectrum_equals_the_published_one(map_size, taps, poisoned_empty):
    _, kernel, _ = draw(map_size, taps=taps)
    spectrum = kernel_spectrum(kernel, map_size)
    published = reference_spectrum(kernel, map_size)
    expected = torch.stack([published.real, published.imag], dim=1)
    torch.testing.assert_close(spectrum, expected, rtol=1e-12, atol=1e-12)
    assert spectrum.is_contiguous()
    grad = any_spectrum(map_size).detach()
    (ours,) = torch.autograd.grad(spectrum, kernel, grad)
    (theirs,) = torch.autograd.grad(expected, kernel, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("map_size", [(1, 1), (3, 4), (4, 3)])
def test_gradcheck(map_size, method):
    x, kernel, _ = draw(map_size, batch=1, channels=(2, 3), taps=(2, 3))
    assert torch.autograd.gradcheck(lambda k: kernel_spectrum(k, map_size), kernel)
    assert torch.autograd.gradgradcheck(lambda k: kernel_spectrum(k, map_size).square(), kernel)
    spectrum = any_spectrum(map_size, (2, 3))
    function = lambda x, s: fourier_conv(x, s, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, spectrum))


@pytest.mark.parametrize("registered", [False, True])
def test_second_derivative(method, registered):
    x, _, _ = draw((3, 4), batch=1, channels=(2, 3))
    spectrum = any_spectrum((3, 4), (2, 3))

    def function(x: Tensor, spectrum: Tensor) -> Tensor:
        if registered:
            return torch.ops.lipfast.fourier_conv(x, spectrum, "torch")[0]
        return fourier_conv(x, spectrum, backend="torch")

    assert torch.autograd.gradgradcheck(function, (x, spectrum))
    loss = lambda: function(x, spectrum).square().sum()  # noqa: E731
    plain = torch.autograd.grad(loss(), (x, spectrum))
    again = torch.autograd.grad(loss(), (x, spectrum), create_graph=True)
    torch.testing.assert_close(again, plain)


def relative_error(values: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(values, exact, strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("map_size", [(10, 10), (12, 34), (48, 48)])
def test_float32_is_as_exact_as_the_published_form(map_size, method):
    x, kernel, grad = draw(map_size, channels=(16, 8))
    exact_y = circular_convolution(x, kernel)
    exact = [exact_y, *torch.autograd.grad(exact_y, (x, kernel), grad)]
    errors = {}
    for backend in BACKENDS:
        x32, k32 = (t.detach().float().requires_grad_() for t in (x, kernel))
        y = fourier_conv(x32, kernel_spectrum(k32, map_size), backend=backend)
        gradients = torch.autograd.grad(y, (x32, k32), grad.float())
        errors[backend] = relative_error([y, *gradients], exact)
    # sums of n terms where the FFT has log n: a few units in the last place more
    assert errors["torch"] < 4 * errors["reference"] + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_computed_in_float32(dtype):
    x, kernel, grad = draw((5, 6), dtype=dtype)
    spectrum = kernel_spectrum(kernel, (5, 6))
    assert spectrum.dtype == torch.float32
    assert torch.equal(spectrum, kernel_spectrum(kernel.float(), (5, 6)))
    y = fourier_conv(x, spectrum)
    assert y.dtype == dtype
    assert torch.equal(y, fourier_conv(x.float(), spectrum).to(dtype))
    assert all(g.dtype == dtype for g in torch.autograd.grad(y, (x, kernel), grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_apply(backend):
    x, kernel, grad = draw((5, 6), channels=(16, 16), dtype=torch.float32)

    def values() -> tuple[Tensor, ...]:
        y = fourier_conv(x, kernel_spectrum(kernel, (5, 6)), backend=backend)
        return y, *torch.autograd.grad(y, (x, kernel), grad)

    plain = values()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, values()))


def test_any_memory_format(method):
    x, kernel, grad = draw((9, 12), batch=3, channels=(3, 4))
    spectrum = kernel_spectrum(kernel, (9, 12))
    expected = fourier_conv(x, spectrum, backend="torch")
    (grad_x,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
    other = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    turned = spectrum.detach().transpose(0, 3).contiguous().transpose(0, 3)
    y = fourier_conv(other, turned, backend="torch")
    torch.testing.assert_close(y, expected)
    late = grad.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.autograd.grad(y, other, late)[0], grad_x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_keeps_the_graph(backend, method, poisoned_empty):
    x, kernel, grad = draw((5, 4), batch=0)
    spectrum = kernel_spectrum(kernel, (5, 4))
    y = fourier_conv(x, spectrum, backend=backend)
    assert y.shape == (0, 4, 5, 4)
    grad_x, grad_kernel = torch.autograd.grad(y, (x, kernel), grad)
    assert grad_x.shape == x.shape
    assert not grad_kernel.any()


@pytest.mark.parametrize("channels", [(0, 3), (4, 0)])
def test_no_channels(channels, method, poisoned_empty):
    x, kernel, grad = draw((5, 4), channels=channels)
    spectrum = kernel_spectrum(kernel, (5, 4))
    y = fourier_conv(x, spectrum, backend="torch")
    assert not y.any()
    assert all(not g.any() for g in torch.autograd.grad(y, (x, kernel), grad))


def test_nan_stays_in_its_image(method):
    x, kernel, _ = draw((5, 4), batch=3)
    with torch.no_grad():
        x[1, 0, 2, 2] = torch.nan
    y = fourier_conv(x, kernel_spectrum(kernel, (5, 4)), backend="torch")
    assert y[1].isnan().all()
    assert y[0].isfinite().all()
    assert y[2].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("map_size", [*MAPS, (34, 34), (113, 3)])
def test_gpu_equals_the_published_form(map_size, backend, poisoned_empty):
    x, _, grad = draw(map_size, batch=40, channels=(70, 33))
    spectrum = any_spectrum(map_size, (70, 33))
    y = fourier_conv(x, spectrum, backend="reference")
    exact = [y, *torch.autograd.grad(y, (x, spectrum), grad)]
    inputs = [t.detach().float().cuda().requires_grad_() for t in (x, spectrum)]
    runs = []
    for _ in range(2):
        y = fourier_conv(*inputs, backend=backend)
        runs.append([y, *torch.autograd.grad(y, inputs, grad.float().cuda())])
    assert all(map(torch.equal, *runs))
    assert relative_error([t.cpu() for t in runs[0]], exact) < 1e-5


@pytest.mark.gpu
def test_gpu_tables_are_not_made_during_capture():
    x, kernel, _ = (t.detach().float().cuda() for t in draw((7, 9)))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before capturing"), torch.cuda.graph(graph):
        fourier_conv(x, kernel_spectrum(kernel, (7, 9)))
    expected = fourier_conv(x, kernel_spectrum(kernel, (7, 9)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fourier_conv(x, kernel_spectrum(kernel, (7, 9)))
    graph.replay()
    torch.testing.assert_close(y, expected)
