"""The implicit-GEMM convolution and its epilogues, executed by Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

from lipfast.kernels import convolution as kernels
from lipfast.ops.residual_conv import _pack, _unpack
from lipfast.reference import conv2d_same, conv2d_same_adjoint

pytestmark = pytest.mark.interpreter

# n, in, out, h, w, kh, kw: odd sizes, maps smaller than the kernel, more than one tile of each kind
SIZES = [
    *[
        (2, 5, 7, 6, 5, 3, 3),
        (3, 1, 1, 1, 1, 3, 7),
        (1, 17, 40, 3, 2, 5, 1),
        (1, 3, 130, 2, 2, 1, 3),
    ],
    *[(1, 40, 16, 9, 8, 3, 1), (1, 16, 16, 2, 67, 1, 3), (5, 48, 80, 5, 4, 1, 1)],
]
SIZE = pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
MODE = pytest.mark.parametrize("mode", ["zeros", "circular"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def draw(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a kernel whose convolution is of the size of x, and a map of the size of the result."""
    n, in_, out, h, w, kh, kw = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, h, w, in_, generator=generator).permute(0, 3, 1, 2)
    kernel = torch.randn(out, in_, kh, kw, generator=generator) / math.sqrt(in_ * kh * kw)
    other = torch.randn(n, h, w, out, generator=generator).permute(0, 3, 1, 2)
    return x.to(dtype), kernel.to(dtype), other.to(dtype)


def check(value: Tensor, exact: Tensor) -> None:
    """Errors of the accumulation in float32 and of rounding to the dtype."""
    eps = torch.finfo(value.dtype).eps
    assert (value.double() - exact).abs().max() <= 2 * eps * (exact.abs().max() + 1)


@MODE
@SIZE
@DTYPE
def test_sum(size, mode, dtype):
    x, kernel, addend = draw(size, dtype)
    exact = conv2d_same(x.double(), kernel.double(), None, mode)
    out, second = torch.full_like(addend, math.nan), torch.full_like(addend, math.nan)
    taps = kernels.pack_taps(kernel)
    kernels.convolution_sum(
        x, taps, mode, out, beta=-0.5, alpha=2.0, addend=addend, gamma=0.25, second=second
    )
    check(out, 2 * addend.double() - 0.5 * exact)
    check(second, 0.25 * exact)
    kernels.convolution_sum(x, taps, mode, addend, beta=1.0, alpha=0.0, addend=addend)
    check(addend, exact)


@MODE
@SIZE
def test_adjoint(size, mode):
    x, kernel, y = draw(size, torch.float32)
    exact = conv2d_same_adjoint(y.double(), kernel.double(), mode)
    out = torch.full_like(x, math.nan)
    taps = kernels.pack_adjoint_taps(kernel)
    kernels.convolution_sum(y, taps, mode, out, beta=1.0, alpha=-1.0, addend=x)
    check(out, exact - x.double())


@DTYPE
@MODE
@SIZE
def test_relu_and_masked(size, mode, dtype):
    x, kernel, like = draw(size, dtype)
    bias = torch.randn(kernel.shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    taps = kernels.pack_taps(kernel)
    mask = torch.full(((like.numel() + 7) // 8,), 0xA5, dtype=torch.uint8)
    for b in (bias, None):
        exact = conv2d_same(x.double(), kernel.double(), None if b is None else b.double(), mode)
        hidden = torch.full_like(like, math.nan)
        kernels.convolution_relu(x, taps, b, mode, hidden, mask)
        check(hidden, exact.relu())
        assert torch.equal(mask, _pack((hidden > 0).permute(0, 2, 3, 1).reshape(-1)))
        given = torch.randint(256, mask.shape, dtype=torch.uint8)
        kernels.convolution_masked(x, taps, b, mode, given, hidden)
        check(hidden, exact * _unpack(given, tuple(like.shape), True))


def test_relu_keeps_nan():
    x, kernel, like = draw((1, 8, 8, 3, 3, 1, 1), torch.float32)
    x[0, :, 1, 1] = math.nan
    mask = torch.empty(9, dtype=torch.uint8)
    kernels.convolution_relu(x, kernels.pack_taps(kernel), None, "zeros", like, mask)
    assert like[0, :, 1, 1].isnan().all()
    assert like.isnan().sum() == 8
    assert mask[4] == 0


def test_wide_positions(monkeypatch):
    x, kernel, addend = draw((2, 5, 7, 6, 5, 3, 3), torch.float32)
    monkeypatch.setattr(kernels, "_NARROW_POSITIONS", 0)
    for mode in ("zeros", "circular"):
        out = torch.full_like(addend, math.nan)
        kernels.convolution_sum(
            x, kernels.pack_taps(kernel), mode, out, beta=1.0, alpha=1.0, addend=addend
        )
        check(out, addend.double() + conv2d_same(x.double(), kernel.double(), None, mode))


def test_sums_of_another_dtype():
    x, kernel, _ = draw((2, 5, 7, 6, 5, 3, 3), torch.float16)
    addend = draw((2, 5, 7, 6, 5, 3, 3), torch.float32)[2]
    exact = conv2d_same(x.double(), kernel.double(), None, "zeros")
    out = torch.full_like(addend, math.nan)
    kernels.convolution_sum(
        x, kernels.pack_taps(kernel), "zeros", out, beta=1.0, alpha=1.0, addend=addend
    )
    check(out, addend.double() + exact)


@pytest.mark.parametrize(
    "size", [(0, 3, 3, 4, 4, 3, 3), (2, 0, 3, 4, 4, 3, 3), (2, 3, 0, 4, 4, 3, 3)]
)
def test_empty(size):
    x, kernel, addend = (torch.zeros(shape) for shape in empty_shapes(size))
    out, taps = torch.full_like(addend, math.nan), kernels.pack_taps(kernel)
    kernels.convolution_sum(x, taps, "circular", out, beta=1.0, alpha=1.0, addend=addend)
    assert torch.equal(out, addend)
    mask = torch.zeros((out.numel() + 7) // 8, dtype=torch.uint8)
    kernels.convolution_relu(x, taps, None, "zeros", out, mask)
    assert not out.any()
    assert not mask.any()


def empty_shapes(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    n, in_, out, h, w, kh, kw = size
    return [(n, in_, h, w), (out, in_, kh, kw), (n, out, h, w)]
