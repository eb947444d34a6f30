"""The convolution of the layers: its fast forms against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from lipfast import reference
from lipfast.ops.convolution import conv2d

OPTIONS = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}


@pytest.mark.parametrize("padding", [(1, 1), (2, 1), (0, 2)])
@pytest.mark.parametrize("size", [(5, 4), (2, 2), (7, 3)])
def test_circular_padding_has_torchs_gradients(size, padding):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(
        4, 3, 2 * padding[0] + 1, 2 * padding[1] + 1, dtype=torch.float64, requires_grad=True
    )
    y = conv2d(x, kernel, None, "circular", padding=padding, **OPTIONS)
    (ph, pw) = padding
    expected = F.conv2d(F.pad(x, (pw, pw, ph, ph), mode="circular"), kernel)
    grad = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(y, (x, kernel), grad)
    for a, b in zip(found, torch.autograd.grad(expected, (x, kernel), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_circular_padding_differentiates_twice_and_forward():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, kernel):
        return conv2d(x, kernel, None, "circular", padding=(1, 1), **OPTIONS)

    assert torch.autograd.gradcheck(run, (x, kernel))
    assert torch.autograd.gradgradcheck(run, (x, kernel))
    _, tangent = torch.func.jvp(run, (x, kernel), (x, kernel))
    torch.testing.assert_close(tangent, 2 * run(x, kernel))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_1x1_maps_are_products_of_matrices(mode, bias):
    torch.manual_seed(0)
    x = torch.randn(5, 6, 1, 1, dtype=torch.float64)
    kernel = torch.randn(4, 6, 1, 1, dtype=torch.float64)
    added = torch.randn(4, dtype=torch.float64) if bias else None
    y = conv2d(x, kernel, added, mode, padding=(0, 0), **OPTIONS)
    assert y.shape == (5, 4, 1, 1)
    torch.testing.assert_close(y, F.conv2d(x, kernel, added), rtol=1e-12, atol=1e-12)
    back = reference.conv2d_same_adjoint(y, kernel, mode)
    expected = F.conv_transpose2d(y, kernel)
    torch.testing.assert_close(back, expected, rtol=1e-12, atol=1e-12)
    assert conv2d(x[:0], kernel, added, mode, padding=(0, 0), **OPTIONS).shape == (0, 4, 1, 1)
    grouped = torch.randn(6, 3, 1, 1, dtype=torch.float64)
    y = reference.conv2d(
        x, grouped, None, mode, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=2
    )
    torch.testing.assert_close(y, F.conv2d(x, grouped, groups=2))
