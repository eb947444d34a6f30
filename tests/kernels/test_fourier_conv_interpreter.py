"""The Triton kernel of fourier_conv, executed on the CPU by Triton's interpreter."""

import pytest
import torch

from lipfast.ops import fourier_conv, fourier_conv_gemm

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("map_size", [(1, 1), (3, 4), (5, 3)])
@pytest.mark.parametrize("channels", [(1, 1), (3, 5), (17, 40), (70, 16)])
def test_forward_and_backward(channels, map_size, poisoned_empty):
    out_channels, in_channels = channels
    h, w = map_size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, in_channels, h, w, generator=generator).requires_grad_()
    shape = (h * (w // 2 + 1), 2, out_channels, in_channels)
    spectrum = torch.randn(shape, generator=generator).requires_grad_()
    grad = torch.randn(3, out_channels, h, w, generator=generator)
    y = fourier_conv(x, spectrum, backend="triton")
    ours = (y, *torch.autograd.grad(y, (x, spectrum), grad))
    wide = [t.detach().double().requires_grad_() for t in (x, spectrum)]
    y = fourier_conv(*wide, backend="reference")
    exact = (y, *torch.autograd.grad(y, wide, grad.double()))
    for value, reference in zip(ours, exact, strict=True):
        error = (value.double() - reference).abs().max()
        assert error <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize(("n", "out", "channels"), [(1, 1, 1), (65, 33, 17), (3, 130, 70)])
def test_products_equal_those_of_torch(n, out, channels, poisoned_empty):
    from lipfast.kernels import fourier_conv as kernels

    generator = torch.Generator().manual_seed(0)
    x_hat = torch.randn(2, 3, n, channels, generator=generator)
    y_hat = torch.randn(2, 3, n, out, generator=generator)
    spectrum = torch.randn(3, 2, out, channels, generator=generator)
    matrices = (spectrum[:, 0], spectrum[:, 1])
    calls = [
        ("multiply", (x_hat, matrices)),
        ("multiply_adjoint", (y_hat, matrices)),
        ("correlate", (y_hat, x_hat)),
    ]
    for name, arguments in calls:
        ours = getattr(kernels, name)(*arguments)
        expected = getattr(fourier_conv_gemm, name)(*arguments)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
