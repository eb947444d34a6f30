"""The Triton kernels of maxmin, executed on the CPU by Triton's interpreter."""

import pytest
import torch
from maxmin_definition import definition

from lipfast.ops import maxmin

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 4), (3, 7), (5, 1), (1, 2, 1), (2, 3, 5), (3, 6, 3, 5), (2, 5, 4, 4), (2, 4, 33, 31)]
SHAPES += [(1, 1030), (2, 9, 17, 31)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, dtype, channels_last, poisoned_empty):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    y_expected, grad_expected = definition(x, grad)
    y = maxmin(x.requires_grad_(), backend="triton")
    (out,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(y.double(), y_expected)
    assert torch.equal(out, grad_expected)


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 4, 4, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_writes_the_mask_of_the_other_backends(shape, channels_last):
    x = torch.randn(shape)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    op = torch.ops.lipfast.maxmin
    assert torch.equal(op(x, "triton")[1], op(x, "cpp")[1])


def test_wide_addresses(monkeypatch):
    from lipfast.kernels import maxmin as kernels

    x = torch.randn(2, 5, 300)
    y, out, mask = torch.empty_like(x), torch.empty_like(x), torch.empty(150, dtype=torch.uint8)
    monkeypatch.setattr(kernels, "_NARROW_ELEMENTS", 0)
    kernels.maxmin_forward(x, y, mask, channels_last=False)
    kernels.maxmin_backward(x, out, mask, channels_last=False)
    assert torch.equal(y.double(), definition(x, x)[0])
    assert torch.equal(out, definition(x, x)[1])


def test_twice_the_pairs_may_need_64_bits():
    from lipfast.kernels import maxmin as kernels

    x = torch.randn(kernels._BLOCK, 2)
    y, mask = torch.empty_like(x), torch.empty(kernels._BLOCK // 8, dtype=torch.uint8)
    layout = {"CHANNELS_LAST": True, "ODD": False, "WIDE": True, "BLOCK": kernels._BLOCK}
    # the first of 2**20 programs, and the only one that runs
    kernels.maxmin_forward_kernel[(1,)](x, y, mask, 2**30, 0, 2, 1, **layout)
    assert torch.equal(y.double(), definition(x, x)[0])
    kernels.maxmin_backward_kernel[(1,)](x, y, mask, 2**30, 0, 2, 1, **layout)
    assert torch.equal(y, definition(x, x)[1])


def test_special_values():
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
    first, second = torch.meshgrid(values, values, indexing="ij")
    x = torch.stack([first, second]).flatten(1).unsqueeze(0)
    y = maxmin(x, backend="triton")
    assert torch.equal(y.isnan().all(dim=1), x.isnan().any(dim=1))
    finite = ~x.isnan().any(dim=1, keepdim=True).expand_as(x)
    assert torch.equal(y[finite].double(), definition(x, x)[0][finite])
