"""csrc/aol_rescale.cu: executed on the CPU by way of the host compiler, and compiled by nvcc."""

import ctypes
import math

import pytest
import torch
from compiled_kernels import needs_nvcc, nvcc_resources
from torch import Tensor

from lipfast.ops import aol_rescale

ROWS = 8  # csrc/aol_rescale.h: kAolRescaleRows
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def library(build_on_cpu) -> ctypes.CDLL:
    return build_on_cpu("aol_rescale")


def run(
    library, weight: Tensor, r: Tensor, scaled: Tensor, *results: Tensor, channels_last: bool
) -> None:
    """Forward without results, else backward to dL/dweight and the partial sums."""
    tensors = (weight, r, scaled, *results)
    addresses = [tensor.data_ptr() for tensor in tensors] + [0, 0]
    library.aol_rescale_on_cpu(
        ctypes.c_bool(not results),
        *[ctypes.c_void_p(address) for address in addresses[:5]],
        *[ctypes.c_int64(size) for size in weight.shape],
        ctypes.c_bool(channels_last),
        ctypes.c_bool(weight.dtype == torch.float64),
        ctypes.c_int(DTYPES.index(scaled.dtype)),
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("weight_dtype", "dtype"), [*[(torch.float32, dtype) for dtype in DTYPES[1:]], DTYPES[:1] * 2]
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 9), (1, 9, 66, 3), (1, 17, 4, 33)])
def test_forward_and_backward(library, shape, weight_dtype, dtype, channels_last):
    generator = torch.Generator().manual_seed(0)
    n, rows, channels, taps = shape
    weight = torch.randn(shape, generator=generator).to(weight_dtype)
    r = (torch.rand(n, channels, generator=generator) + 0.5).to(weight_dtype)
    r[0, 0] = 0
    grad = torch.randn(shape, generator=generator).to(dtype)

    exact = weight.double().flatten(0, 1)[..., None].requires_grad_(), r.double().requires_grad_()
    scaled = torch.stack(
        [
            aol_rescale(w, v, backend="reference")
            for w, v in zip(exact[0].unflatten(0, (n, rows)), exact[1], strict=True)
        ]
    ).squeeze(-1)
    expected = torch.autograd.grad(scaled, exact, grad.double())

    memory = (n, rows, taps, channels) if channels_last else shape
    out = torch.full(memory, math.nan, dtype=dtype)
    run(library, weight, r, out, channels_last=channels_last)
    out = out.mT if channels_last else out
    epsilon = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(weight_dtype).eps
    assert ((out.double() - scaled).abs() <= epsilon * scaled.abs() * (1 + 2**-7)).all()

    turned = grad.mT.contiguous() if channels_last else grad
    grad_weight = torch.full(shape, math.nan, dtype=weight_dtype)
    partial = torch.full((n, math.ceil(rows / ROWS), channels), math.nan, dtype=weight_dtype)
    run(library, weight, r, turned, grad_weight, partial, channels_last=channels_last)
    assert partial.isfinite().all()
    grad_r = torch.where(r > 0, partial.sum(dim=1) / (-2 * r), 0)
    tolerance = 16 * torch.finfo(weight_dtype).eps
    for ours, theirs in ((grad_weight, expected[0].reshape(shape)), (grad_r, expected[1])):
        assert (ours - theirs).norm() <= tolerance * (theirs.norm() + scaled.norm())


def test_casts_special_values_as_torch_does(library):
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3e38, 1e-40]
    weight = torch.tensor(values)[None, None, None]
    for dtype in DTYPES[2:]:
        out = torch.zeros(weight.shape, dtype=dtype)
        run(library, weight, torch.ones(1, 1), out, channels_last=False)
        torch.testing.assert_close(out, weight.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_compiles_without_spills(arch, tmp_path, check_baseline):
    kernels = nvcc_resources("aol_rescale", arch, tmp_path / "aol_rescale.cubin")
    assert len(kernels) == 2 * 2 * 4  # (forward, backward) x (float32, float64) x dtypes
    for taken in kernels.values():
        assert taken["stack"] == taken["spill_stores"] == taken["spill_loads"] == 0
    check_baseline("cuda", {f"{name} sm_{arch}": taken for name, taken in kernels.items()})
