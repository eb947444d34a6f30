"""csrc/maxmin.cu: executed on the CPU by way of the host compiler, and compiled by nvcc."""

import ctypes
import math

import pytest
import torch
from compiled_kernels import needs_nvcc, nvcc_resources
from maxmin_definition import definition
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # csrc/maxmin.h: DType
SHAPES = [(2, 4), (3, 7), (5, 1), (1, 2, 1), (2, 3, 5), (3, 6, 3, 5), (2, 5, 4, 4), (2, 4, 33, 31)]
SHAPES += [(2, 64, 16, 16), (2, 9, 8, 8), (3, 6, 7, 1)]


@pytest.fixture(scope="module")
def library(build_on_cpu) -> ctypes.CDLL:
    return build_on_cpu("maxmin")


def run(library, forward: bool, x: Tensor, mask: Tensor, channels_last: bool) -> Tensor:
    y = torch.full_like(x, math.nan)
    sizes = [x.shape[0], x.shape[1], math.prod(x.shape[2:])]
    library.maxmin_on_cpu(
        ctypes.c_bool(forward),
        *[ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y, mask)],
        *[ctypes.c_int64(size) for size in sizes],
        ctypes.c_bool(channels_last),
        ctypes.c_int(DTYPES.index(x.dtype)),
    )
    return y


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(library, shape, dtype, channels_last):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if channels_last:
        x, grad = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad))
    pairs = shape[0] * (shape[1] // 2) * math.prod(shape[2:])
    mask = torch.full(((pairs + 7) // 8,), 0xFF, dtype=torch.uint8)
    y_expected, grad_expected = definition(x, grad)
    assert torch.equal(run(library, True, x, mask, channels_last).double(), y_expected)
    assert torch.equal(run(library, False, grad, mask, channels_last), grad_expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_addresses_that_are_not_aligned(library, dtype, offset):
    x = torch.randn(offset + 2 * 4 * 16).to(dtype)[offset:].view(2, 4, 16)
    mask = torch.zeros(8, dtype=torch.uint8)
    assert torch.equal(run(library, True, x, mask, False).double(), definition(x, x)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(library, dtype):
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, torch.finfo(dtype).tiny / 2]
    first, second = torch.meshgrid(*[torch.tensor(values, dtype=dtype)] * 2, indexing="ij")
    x = torch.stack([first, second]).flatten(1).unsqueeze(0)
    mask = torch.zeros((x.shape[2] + 7) // 8, dtype=torch.uint8)
    y = run(library, True, x, mask, False).double()
    assert torch.equal(y.isnan().all(dim=1), x.isnan().any(dim=1))
    finite = ~x.isnan().any(dim=1, keepdim=True).expand_as(x)
    assert torch.equal(y[finite], definition(x, x)[0][finite])


def test_barriers_and_shared_memory(library):
    numbers = torch.arange(3 * 64, dtype=torch.int32)
    out = torch.zeros_like(numbers)
    library.rotate_on_cpu(
        ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_uint(3)
    )
    assert torch.equal(out.view(3, 64), numbers.view(3, 64).roll(-1, dims=1))


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_compiles_without_spills(arch, tmp_path, check_baseline):
    kernels = nvcc_resources("maxmin", arch, tmp_path / "maxmin.cubin")
    assert len(kernels) == 2 * 4 + 2 * 3  # (aligned or not) x (dtypes forward, sizes backward)
    for taken in kernels.values():
        assert taken["stack"] == taken["spill_stores"] == taken["spill_loads"] == 0
        assert taken["registers"] <= 64
    check_baseline("cuda", {f"{name} sm_{arch}": taken for name, taken in kernels.items()})
