"""The skew_exp launchers on the Triton convolution, executed by Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

from lipfast.reference import conv2d_same, skew_kernel

pytestmark = pytest.mark.interpreter

RATIOS = (0.95, 0.475, 0.3, 0.19)
A0 = 0.9


def draw(shape: tuple[int, ...], kh: int, kw: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    c = shape[1]
    kernel = skew_kernel(torch.randn(c, c, kh, kw, generator=generator)) / math.sqrt(c * kh * kw)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, kernel, grad


def recurrence(x, kernel, grad, ratios, mode):
    """What the launchers return, in float64; dL/dx by torch's derivative."""
    x, kernel, grad = x.double().requires_grad_(), kernel.double(), grad.double()
    z = x
    terms = []
    for ratio in reversed(ratios):
        terms.insert(0, z)
        z = x + ratio * conv2d_same(z, kernel, None, mode)
    y = A0 * z
    (grad_x,) = torch.autograd.grad(y, x, grad)
    h, scaled = A0 * grad, []
    for ratio in ratios:
        scaled.append(ratio * h)
        h = -conv2d_same(scaled[-1], kernel, None, mode)
    return y, terms, grad_x, scaled


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, torch.contiguous_format), (torch.float16, torch.channels_last)],
)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(
    ("steps", "shape", "kh", "kw"),
    [(4, (2, 5, 6, 4), 3, 3), (3, (1, 17, 2, 3), 5, 1), (1, (2, 1, 1, 1), 3, 3)],
)
def test_forward_and_backward(steps, shape, kh, kw, mode, layout, dtype, poisoned_empty):
    from lipfast.kernels import skew_exp as kernels

    x, kernel, grad = (t.to(dtype) for t in draw(shape, kh, kw))
    ratios = RATIOS[:steps]
    y, terms, grad_x, scaled = recurrence(x, kernel, grad, ratios, mode)
    x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
    arguments = (kernel, ratios, A0, mode)
    ours = (
        *kernels.skew_exp_forward(x, *arguments),
        *kernels.skew_exp_backward(grad, *arguments),
    )
    eps = torch.finfo(dtype).eps
    for value, exact in zip(
        ours, (y, torch.stack(terms), grad_x, torch.stack(scaled)), strict=True
    ):
        assert value.dtype == dtype
        assert value.shape == exact.shape
        assert (value.double() - exact).norm() <= 2 * eps * exact.detach().norm()
    assert ours[0].is_contiguous(memory_format=layout)
    assert ours[2].is_contiguous(memory_format=layout)

    alone, none = kernels.skew_exp_forward(x, *arguments, keep=False)
    assert torch.equal(alone, ours[0])
    assert none.shape == (0, *shape)


def test_empty_batch_and_no_ratios():
    from lipfast.kernels import skew_exp as kernels

    x, kernel, grad = draw((0, 3, 4, 5), 3, 3)
    for function, argument in [
        (kernels.skew_exp_forward, x),
        (kernels.skew_exp_backward, grad),
    ]:
        value, terms = function(argument, kernel, RATIOS, A0, "zeros")
        assert value.shape == x.shape
        assert value.stride() == x.stride()
        assert terms.shape == (4, 0, 3, 4, 5)
    x, kernel, grad = draw((2, 3, 4, 5), 3, 3)
    assert torch.equal(kernels.skew_exp_forward(x, kernel, (), A0, "zeros")[0], A0 * x)
    assert torch.equal(kernels.skew_exp_backward(grad, kernel, (), A0, "zeros")[0], A0 * grad)
