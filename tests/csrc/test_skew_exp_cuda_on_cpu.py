"""csrc/skew_exp.cu and its launchers: executed by way of the host compiler, compiled by nvcc."""

import ctypes
import math
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compiled_kernels import NVCC, ROOT, TENSOR_CORE, needs_nvcc, nvcc_resources
from torch import Tensor

from lipfast import backends
from lipfast.ops import skew_exp_cuda
from lipfast.reference import conv2d_same, skew_kernel

RATIOS = (0.95, 0.475, 0.3, 0.19)
A0 = 0.9


@pytest.fixture(scope="module")
def library(build_on_cpu) -> ctypes.CDLL:
    library = build_on_cpu("skew_exp")
    library.skew_exp_on_cpu.restype = ctypes.c_int64
    return library


@pytest.fixture
def launchers(library, monkeypatch, poisoned_empty):
    """lipfast.ops.skew_exp_cuda on the CPU build in place of lipfast._C and the CUDA runtime."""

    def run(forward: bool, p: SimpleNamespace) -> None:
        pointers = [ctypes.c_void_p(value) for value in (p.x, p.taps, p.out, p.terms)]
        sizes = [p.channels, p.height, p.width, p.kh, p.kw, len(p.ratios)]
        library.skew_exp_on_cpu(
            ctypes.c_bool(forward),
            *pointers,
            ctypes.c_int64(p.batch),
            *map(ctypes.c_int, sizes),
            ctypes.c_bool(p.circular),
            ctypes.c_bool(p.channels_last),
            ctypes.c_int(p.dtype),
            ctypes.c_bool(p.tensor_cores),
            ctypes.c_double(p.a0),
            (ctypes.c_double * len(p.ratios))(*p.ratios),
        )

    extension = SimpleNamespace(
        skew_exp_each=4,
        skew_exp_tile=16,
        SkewExpParams=SimpleNamespace,
        skew_exp_forward_cuda=lambda params, stream: run(True, params),
        skew_exp_backward_cuda=lambda params, stream: run(False, params),
    )
    monkeypatch.setattr(backends, "extension", lambda: extension)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return skew_exp_cuda


def draw(shape: tuple[int, ...], kh: int, kw: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    c = shape[1]
    kernel = torch.randn(c, c, kh, kw, generator=generator, dtype=torch.float64)
    x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, skew_kernel(kernel) / math.sqrt(c * kh * kw), grad


def recurrence(x: Tensor, kernel: Tensor, grad: Tensor, ratios: tuple[float, ...], mode: str):
    """What the launchers return, in float64; dL/dx by torch's derivative."""
    x, kernel, grad = x.double().requires_grad_(), kernel.double(), grad.double()
    z, terms = x, []
    for ratio in reversed(ratios):
        terms.insert(0, z)
        z = x + ratio * conv2d_same(z, kernel, None, mode)
    y = A0 * z
    (grad_x,) = torch.autograd.grad(y, x, grad)
    h, scaled = A0 * grad, []
    for ratio in ratios:
        scaled.append(ratio * h)
        h = -conv2d_same(scaled[-1], kernel, None, mode)
    return y, torch.stack(terms), grad_x, torch.stack(scaled)


# odd sizes, maps smaller than the kernel, both shapes of a warp's tile, several tiles per warp
SHAPES = [
    *[((2, 5, 6, 4), 3, 3), ((1, 17, 2, 3), 5, 1), ((2, 1, 1, 1), 3, 7), ((1, 16, 5, 8), 1, 1)],
    *[((1, 40, 9, 11), 1, 3), ((1, 3, 40, 31), 3, 1), ((3, 32, 3, 3), 3, 3)],
]


@pytest.fixture
def tf32():
    """Set whether torch's convolutions may use TF32."""
    allowed = torch.backends.cudnn.allow_tf32
    yield lambda allow: setattr(torch.backends.cudnn, "allow_tf32", allow)
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize(
    ("dtype", "layout", "factors"),
    [
        (torch.float64, torch.channels_last, 2.0**-53),
        (torch.float32, torch.contiguous_format, 2.0**-24),
        (torch.float32, torch.channels_last, 2.0**-11),  # TF32
        (torch.bfloat16, torch.channels_last, 2.0**-9),
        (torch.bfloat16, torch.contiguous_format, 2.0**-9),
    ],
)
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize(("shape", "kh", "kw"), SHAPES)
def test_forward_and_backward(launchers, tf32, shape, kh, kw, mode, dtype, layout, factors):
    x, kernel, grad = (t.to(dtype) for t in draw(shape, kh, kw))
    x, grad = (t.contiguous(memory_format=layout) for t in (x, grad))
    ratios = RATIOS[: 1 + shape[0]]
    exact = recurrence(x, kernel, grad, ratios, mode)
    tf32(factors == 2.0**-11)
    arguments = (kernel, ratios, A0, mode)
    ours = (
        *launchers.skew_exp_forward(x, *arguments),
        *launchers.skew_exp_backward(grad, *arguments),
    )
    # rounding of the elements, and of sums of so many products
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance = (
        2 * torch.finfo(dtype).eps + 2 * factors + math.sqrt(shape[1] * kh * kw) / 4 * accumulated
    )
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == dtype
        assert value.shape == reference.shape
        error = (value.double() - reference).norm()
        assert error <= tolerance * reference.detach().norm()
        assert value.flatten(0, -4).is_contiguous(memory_format=layout)

    alone, none = launchers.skew_exp_forward(x, *arguments, keep=False)
    assert torch.equal(alone, ours[0])
    assert none.shape == (0, *shape)


def test_empty_batch(launchers):
    x, kernel, grad = draw((0, 3, 4, 5), 3, 3)
    for function, argument in [
        (launchers.skew_exp_forward, x),
        (launchers.skew_exp_backward, grad),
    ]:
        value, terms = function(argument, kernel, RATIOS, A0, "zeros")
        assert value.shape == (0, 3, 4, 5)
        assert terms.shape == (4, 0, 3, 4, 5)


def test_nan_stays_in_its_reach(launchers):
    x, kernel, _ = draw((1, 4, 5, 5), 3, 3)
    for dtype in (torch.float32, torch.bfloat16):
        small = x.to(dtype)
        small[0, 1, 0, 0] = math.nan
        y, _ = launchers.skew_exp_forward(small, kernel, (0.5,), A0, "zeros")
        assert y[0, :, :2, :2].isnan().any()
        assert not y[0, :, 2:].isnan().any()


def test_shared_memory_counted_by_the_extension_is_that_of_two_maps():
    if backends.extension() is None:
        pytest.skip("lipfast._C is not built")
    count = backends.extension().skew_exp_shared_bytes
    for c, h, w, dtype, size, tensor_cores in [
        (16, 32, 32, 1, 4, False),
        (16, 32, 32, 1, 4, True),
        (64, 16, 16, 2, 2, True),
        (130, 3, 5, 0, 8, False),
    ]:
        maps = 2 * c * h * w * size
        counted = count(c, h, w, dtype, tensor_cores)
        assert maps <= counted <= 1.51 * maps + 4 * h * w + 4096


def test_refuses_without_a_gpu_and_what_does_not_fit(monkeypatch, tf32):
    x = torch.empty(1, 64, 16, 16)
    if not torch.cuda.is_available():
        assert skew_exp_cuda.can_run(x, 4, x.dtype)
    if backends.extension() is None:
        return
    monkeypatch.setattr(backends, "cuda_can_run", lambda x: None)
    gpu = SimpleNamespace(
        shared_memory_per_block_optin=232448, shared_memory_per_block=49152, major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert skew_exp_cuda.can_run(x, 4, torch.float32) is None
    assert "33" in str(skew_exp_cuda.can_run(x, 33, torch.float32))
    assert "float16" in str(skew_exp_cuda.can_run(x, 4, torch.float16))
    assert "shared memory" in str(skew_exp_cuda.can_run(x, 4, torch.float64))
    wide = torch.empty(1, 32, 32, 32)
    assert "shared memory" in str(skew_exp_cuda.can_run(wide, 4, torch.float32))
    assert skew_exp_cuda.can_run(wide, 4, torch.bfloat16) is None
    compiled = torch.compile(
        lambda x: x + (skew_exp_cuda.can_run(x, 4, x.dtype) is None),
        fullgraph=True,
        backend="aot_eager",
    )
    assert compiled(torch.zeros(2, 3, 4, 5)).all()
    gpu.major, gpu.minor = 7, 5
    assert "sm_75" in str(skew_exp_cuda.can_run(x, 4, torch.bfloat16))
    tf32(True)
    assert "sm_75" in str(skew_exp_cuda.can_run(x, 4, torch.float32))
    tf32(False)
    assert skew_exp_cuda.can_run(x, 4, torch.float32) is None


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_nvcc_compiles_without_spills(arch, tmp_path, check_baseline):
    kernels = nvcc_resources("skew_exp", arch, tmp_path / "skew_exp.cubin")
    assert len(kernels) == 2 * 4  # (forward, backward) x (float64, float32, TF32, bfloat16)
    for taken in kernels.values():
        assert taken["stack"] == taken["spill_stores"] == taken["spill_loads"] == 0
        assert taken["registers"] <= 128  # 512 threads
    check_baseline("cuda", {f"{name} sm_{arch}": taken for name, taken in kernels.items()})
    cuobjdump = Path(NVCC).parent / "cuobjdump"
    if cuobjdump.exists():
        command = [str(cuobjdump), "--dump-sass", str(tmp_path / "skew_exp.cubin")]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert re.search(TENSOR_CORE["tf32"][80], code)
        assert re.search(TENSOR_CORE["bf16"][80], code)


@needs_nvcc
def test_nvcc_compiles_for_gpus_without_these_tensor_cores(tmp_path):
    known = subprocess.run([NVCC, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    if "compute_75" not in known.stdout:
        pytest.skip("nvcc no longer knows sm_75")
    command = [NVCC, "-std=c++17", "-O1", "-cubin", "-arch=sm_75"]
    command += ["-o", str(tmp_path / "skew_exp.cubin"), str(ROOT / "csrc" / "skew_exp.cu")]
    subprocess.run(command, check=True)
