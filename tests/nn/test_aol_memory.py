"""AOL: the kernel comes out in the dtype and memory format in which the convolution meets it."""

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast import backends
from lipfast import nn as lnn

FORMATS = [torch.contiguous_format, torch.channels_last]


def kernel_of(layer: lnn.LipschitzModule, x: Tensor) -> Tensor:
    (kernel,) = layer._weights((x.shape[-2], x.shape[-1]), x)
    return kernel


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
def test_autocast(groups, dtype, memory_format):
    torch.manual_seed(0)
    layer = lnn.AOLConv2d(4, 6, 3, groups=groups)
    x = torch.randn(2, 4, 7, 5).to(memory_format=memory_format)
    exact = kernel_of(layer, x).detach()
    if dtype == torch.float32:
        assert exact.is_contiguous(memory_format=memory_format)
        return
    with torch.autocast("cpu", dtype):
        kernel = kernel_of(layer, x)
        y = layer(x)
    assert y.dtype == kernel.dtype == dtype
    assert kernel.is_contiguous(memory_format=memory_format)
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(kernel, exact.to(dtype))
    y.float().square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    assert gradient.dtype == torch.float32
    layer(x).square().sum().backward()
    error = (gradient - layer.weight.grad).norm()
    assert error <= 16 * torch.finfo(dtype).eps * layer.weight.grad.norm()


def test_autocast_leaves_float64_alone():
    layer, x = lnn.AOLConv2d(3, 3, 3, dtype=torch.float64), torch.randn(1, 3, 4, 4).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel_of(layer, x).dtype == layer(x).dtype == torch.float64


def test_short_parameters_are_scaled_before_they_are_rounded():
    layer = lnn.AOLConv2d(4, 4, 3, dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.weight)
    wide = lnn.AOLConv2d(4, 4, 3)
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(kernel_of(layer, x.bfloat16()), kernel_of(wide, x).bfloat16())


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_linear_layers_of_any_rank(shape):
    layer, x = lnn.AOLLinear(4, 3), torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).shape == (*shape[:-1], 3)


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_forced_backends_agree(memory_format, backend):
    if backend == "cpp" and backends.cpp_can_run(torch.empty(0)) is not None:
        pytest.skip("lipfast._C is not built")
    torch.manual_seed(0)
    layer = lnn.AOLConv2d(6, 4, (3, 5), groups=2)
    x = torch.randn(2, 6, 7, 5).to(memory_format=memory_format)
    expected = layer(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), layer.weight)
    with lipfast.backend(backend):
        y = layer(x)
        torch.testing.assert_close(y, expected)
        ours = torch.autograd.grad(y.square().sum(), layer.weight)
    torch.testing.assert_close(ours[0], gradient, rtol=1e-4, atol=1e-5)
