"""csrc/gram_bound.cu: executed on the CPU by way of the host compiler, and compiled by nvcc."""

import ctypes
import math

import pytest
import torch
from compiled_kernels import needs_nvcc, nvcc_resources
from torch import Tensor

from lipfast.reference.gram_bound import gram_bound as published

TILE = 64  # csrc/gram_bound.h: kGramBoundTile


@pytest.fixture(scope="module")
def library(build_on_cpu) -> ctypes.CDLL:
    return build_on_cpu("gram_bound")


def run(library, taps: Tensor, a: Tensor | None, q: Tensor, signs: Tensor, out: Tensor) -> None:
    """Forward without a, else backward; taps (batch, kh, kw, depth, channels)."""
    batch, kh, kw, depth, channels = taps.shape
    addresses = [tensor.data_ptr() if tensor is not None else 0 for tensor in (taps, a, q)]
    library.gram_bound_on_cpu(
        ctypes.c_bool(a is None),
        *[ctypes.c_void_p(address) for address in addresses],
        ctypes.c_void_p(signs.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        *[ctypes.c_int64(size) for size in (batch, channels, depth)],
        ctypes.c_int(kh),
        ctypes.c_int(kw),
        ctypes.c_bool(taps.dtype == torch.float64),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, 1, 3, 3), (1, 3, 3, 3, 3), (1, 17, 17, 3, 3), (2, 5, 7, 2, 4), (1, 33, 70, 1, 1)],
        *[(1, 2, 3, 1, 7), (1, 3, 2, 7, 1), (1, 130, 5, 1, 2), (1, 5, 130, 2, 1)],
    ],
)
def test_forward_and_backward(library, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    batch, _, channels, kh, kw = shape
    weight = torch.randn(shape, generator=generator).to(dtype)
    q = (torch.rand(batch, channels, generator=generator) + 0.5).to(dtype)
    grad = torch.randn(batch, channels, generator=generator).to(dtype)

    exact = weight.double().requires_grad_()
    expected = torch.stack([published(w, v.double()) for w, v in zip(exact, q, strict=True)])
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())

    taps = weight.permute(0, 3, 4, 1, 2).contiguous()
    offsets = ((2 * kh - 1) * (2 * kw - 1) + 1) // 2
    signs = torch.full((batch, channels, offsets, channels), 77, dtype=torch.int8)
    tiles = math.ceil(channels / TILE)
    partial = torch.full((batch, 2, offsets, tiles, channels), math.nan, dtype=dtype)
    run(library, taps, None, q, signs, partial)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    r = partial.sum(dim=(1, 2, 3)) / q
    assert (r.double() - expected).abs().max() <= tolerance * expected.max()
    assert torch.equal(signs[:, :, 0], signs[:, :, 0].mT)
    assert signs.abs().max() == 1

    out = torch.full_like(taps, math.nan)
    run(library, taps, grad / q, q, signs, out)
    error = (out.permute(0, 3, 4, 1, 2).double() - expected_grad).abs().max()
    assert error <= tolerance * expected_grad.abs().max()


def test_zeros_have_no_sign(library):
    taps = torch.randn(1, 2, 2, 3, 5)
    taps[..., 2] = 0
    signs = torch.full((1, 5, 5, 5), 77, dtype=torch.int8)
    partial = torch.full((1, 2, 5, 1, 5), math.nan)
    run(library, taps, None, torch.ones(1, 5), signs, partial)
    assert not signs[:, 2].any()
    assert not signs[..., 2].any()
    assert partial.sum(dim=(1, 2, 3))[0, 2] == 0


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_compiles_without_spills(arch, tmp_path, check_baseline):
    kernels = nvcc_resources("gram_bound", arch, tmp_path / "gram_bound.cubin")
    assert len(kernels) == 2 * 2  # (forward, backward) x (float32, float64)
    for taken in kernels.values():
        assert taken["stack"] == taken["spill_stores"] == taken["spill_loads"] == 0
        assert taken["registers"] <= 255
        assert taken["shared"] <= 48 * 1024
    check_baseline("cuda", {f"{name} sm_{arch}": taken for name, taken in kernels.items()})
