"""The skew_exp launchers on a GPU: Triton and CUDA against float64, and against themselves."""

import math

import pytest
import torch

from lipfast.ops import skew_exp_cuda
from lipfast.ops.skew_exp_cuda import can_run
from lipfast.reference import conv2d_same, skew_kernel

pytestmark = pytest.mark.gpu

RATIOS = (0.95, 0.475, 0.3, 0.19, 0.11)
A0 = 0.9


@pytest.fixture
def exact_float32():
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    "shape", [(5, 16, 32, 24), (3, 64, 16, 16), (7, 17, 9, 5), (130, 32, 4, 4), (2, 3, 2, 1)]
)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_recurrence(backend, shape, mode, layout, dtype, exact_float32):
    x, grad = (
        torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
        for _ in range(2)
    )
    kernel = skew_kernel(torch.randn(shape[1], shape[1], 3, 3, device="cuda"))
    kernel = (kernel / math.sqrt(9 * shape[1])).to(dtype)
    if backend == "cuda":
        launchers = skew_exp_cuda
        reason = can_run(x, len(RATIOS), dtype)
    else:
        from lipfast.kernels import skew_exp as launchers

        reason = "Triton computes in float32" if dtype == torch.float64 else None
    if reason is not None:
        pytest.skip(reason)

    wide, g = kernel.double(), grad.double()
    z, h, terms, scaled = x.double(), A0 * g, [], []
    grad_x = h
    for ratio in reversed(RATIOS):
        terms.insert(0, z)
        z = x.double() + ratio * conv2d_same(z, wide, None, mode)
    for ratio in RATIOS:
        scaled.append(ratio * h)
        h = -conv2d_same(scaled[-1], wide, None, mode)
        grad_x = grad_x + h
    exact = (A0 * z, torch.stack(terms), grad_x, torch.stack(scaled))

    arguments = (kernel, RATIOS, A0, mode)
    for _ in range(2):
        ours = (
            *launchers.skew_exp_forward(x, *arguments),
            *launchers.skew_exp_backward(grad, *arguments),
        )
        for value, reference in zip(ours, exact, strict=True):
            error = (value.double() - reference).norm()
            assert error <= 8 * torch.finfo(dtype).eps * reference.norm()
    again = launchers.skew_exp_forward(x, *arguments, keep=False)[0]
    assert torch.equal(again, ours[0])
