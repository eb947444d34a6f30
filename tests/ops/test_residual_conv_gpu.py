"""residual_conv on a GPU: torch's convolutions and the Triton kernels."""

import pytest
import torch
from residual_conv_cases import arguments

from lipfast.ops import residual_conv
from lipfast.reference import residual_conv as published


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_gpu_equals_the_published_form_in_float64(mode, layout):
    inputs = [t.detach().cuda() for t in arguments((4, 8, 9, 7), 12)]
    inputs[0] = inputs[0].contiguous(memory_format=layout)
    inputs = [t.requires_grad_() for t in inputs]
    y, other = (f(*inputs, mode) for f in (residual_conv, published))
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, inputs, grad) for out in (y, other))
    for a, b in zip([y, *ours], [other, *theirs], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("hidden", [12, 32])
def test_gpu_triton_is_as_near_to_float64_as_the_published_form(hidden, mode, layout):
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        inputs = [t.detach().cuda().float() for t in arguments((4, 16, 9, 7), hidden)]
        inputs[0] = inputs[0].contiguous(memory_format=layout)
        inputs = [t.requires_grad_() for t in inputs]
        wide = [t.detach().double().requires_grad_() for t in inputs]
        grad = torch.randn_like(inputs[0])
        values = []
        for function, given, options in [
            (published, wide, {}),
            (residual_conv, inputs, {"backend": "triton"}),
            (published, inputs, {}),
        ]:
            y = function(*given, mode, **options)
            values.append([y, *torch.autograd.grad(y, given, grad.to(y.dtype))])
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    for exact, ours, theirs in zip(*values, strict=True):
        error, other = ((t.double() - exact).norm() for t in (ours, theirs))
        floor = 4 * torch.finfo(torch.float32).eps * exact.norm()
        assert error <= 2 * other + floor
