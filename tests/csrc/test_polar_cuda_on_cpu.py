"""csrc/polar.cu: executed on the CPU by way of the host compiler, and compiled by nvcc."""

import ctypes
import math

import polar_truth as truth
import pytest
import torch
from compiled_kernels import needs_nvcc, nvcc_resources
from torch import Tensor


@pytest.fixture(scope="module")
def library(build_on_cpu) -> ctypes.CDLL:
    return build_on_cpu("polar")


def run(library, x: Tensor, grad: Tensor | None, w: Tensor, out: Tensor, steps: int) -> None:
    """Forward without grad, else backward; w and out are written, or w is read."""
    batch, planes, rows, columns = x.shape
    numbers = [number for step in truth.SCHEDULE for number in step]
    addresses = [tensor.data_ptr() if tensor is not None else 0 for tensor in (x, grad, w, out)]
    library.polar_on_cpu(
        ctypes.c_bool(grad is None),
        *[ctypes.c_void_p(address) for address in addresses],
        ctypes.c_int64(batch),
        *[ctypes.c_int(size) for size in (planes, rows, columns, steps)],
        (ctypes.c_double * len(numbers))(*numbers),
    )


def forward(library, x: Tensor) -> tuple[Tensor, Tensor]:
    w, residual = torch.full_like(x, math.nan), torch.full((len(x),), math.nan)
    run(library, x, None, w, residual, len(truth.SCHEDULE))
    return w, residual


def backward(library, grad: Tensor, x: Tensor, w: Tensor, steps: int) -> Tensor:
    out = torch.full_like(x, math.nan)
    run(library, x, grad, w, out, steps)
    return out


def draw_grad(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(
    ("batch", "rows", "columns"),
    [
        *[(3, 1, 1), (1, 1, 6), (3, 3, 3), (3, 3, 8), (1, 3, 6), (1, 16, 16), (3, 17, 17)],
        *[
            (1, 17, 22),
            (1, 17, 34),
            (1, 33, 33),
            (3, 33, 38),
            (1, 33, 66),
            (1, 64, 64),
            (1, 64, 69),
        ],
    ],
)
def test_forward_and_backward(library, batch, rows, columns, planes):
    x = truth.draw(batch, planes, rows, columns)
    w, residual = forward(library, x)
    exact = truth.polar_factor(x)
    assert truth.relative_error(w, exact) <= 1e-6
    assert truth.largest_singular_value(w) <= 1 + 1e-6
    torch.testing.assert_close(residual.double(), truth.defect(x), rtol=1e-2, atol=1e-5)

    grad = draw_grad(x)
    expected = truth.derivative(grad, x)
    ours = truth.from_planes(backward(library, grad, x, w, 7))
    # of a real 1 x 1 matrix the derivative is 0
    assert (ours - expected).norm() <= 1e-5 * max(expected.norm(), 1e-2 * grad.norm())


def test_as_large_as_shared_memory(library):
    assert library.polar_shared_bytes(2, 64, 128) <= 200 * 1024
    x = truth.draw(1, 2, 64, 128)
    w, _ = forward(library, x)
    assert truth.relative_error(w, truth.polar_factor(x)) <= 1e-6
    grad = draw_grad(x)
    assert truth.relative_error(backward(library, grad, x, w, 7), truth.derivative(grad, x)) <= 1e-5


def test_ill_conditioned_derivative(library):
    x = truth.draw(1, 2, 17, 20, conditioning=7.0)
    w, _ = forward(library, x)
    grad = draw_grad(x)
    ours = backward(library, grad, x, w, 8)
    assert truth.relative_error(ours, truth.derivative(grad, x)) <= 1e-3


def test_converged_systems_stay_as_they_are(library):
    x = truth.draw(1, 2, 5, 8, conditioning=1.0)
    grad = draw_grad(x)
    few, many = (backward(library, grad, x, x.clone(), steps) for steps in (4, 20))
    assert torch.equal(few, many)
    assert truth.relative_error(many, truth.derivative(grad, x)) <= 1e-5


def test_zero_nan_and_scaled_matrices(library):
    x = truth.draw(6, 2, 5, 7)
    x[0] = 0
    x[1, 0, 2, 3] = math.nan
    x[2, 0, 2, 3] = math.inf
    unit = x[3:].clone()
    scale = torch.tensor([1e20, 1e-20, 1])[:, None, None, None]
    x[3:] *= scale
    w, residual = forward(library, x)
    assert not w[0].any()
    assert residual[0] == pytest.approx(5**0.5)
    assert w[1:3].isnan().all()
    assert residual[1:3].isnan().all()
    assert truth.relative_error(w[3:], truth.polar_factor(unit)) <= 1e-6

    grad = 1e-15 * draw_grad(x)
    ours = backward(library, grad, x, w, 7)
    assert ours[0].isfinite().all()
    assert ours[1:3].isnan().all()
    expected = truth.derivative(grad[3:], unit)
    assert truth.relative_error(scale * ours[3:], expected) <= 1e-5
    assert not backward(library, torch.zeros_like(x), x, w, 7)[3:].any()


@pytest.mark.parametrize(("x_scale", "grad_scale"), [(1, 1e-40), (1e-39, 1e-10), (1e-40, 1e-40)])
def test_derivative_of_denormal_numbers(library, x_scale, grad_scale):
    unit = truth.draw(1, 2, 5, 7)
    x, grad = x_scale * unit, grad_scale * draw_grad(unit)
    w, _ = forward(library, x)
    assert truth.relative_error(w, truth.polar_factor(unit)) <= 1e-4
    ours = backward(library, grad, x, w, 7).double() * (x_scale / grad_scale)
    assert truth.relative_error(ours, truth.derivative(draw_grad(unit), unit)) <= 1e-3


def test_zero_derivative_stays_zero_beside_huge_factors(library):
    x = torch.full((1, 1, 1, 1), 1e-39)
    w, _ = forward(library, x)
    assert not backward(library, torch.full_like(x, 100), x, w, 7).any()


def test_rank_deficient(library):
    x = truth.draw(1, 2, 6, 9)
    x[:, :, 4] = x[:, :, 1]
    w, residual = forward(library, x)
    assert residual[0] == pytest.approx(1, abs=1e-2)
    assert truth.largest_singular_value(w) <= 1 + 1e-6
    assert backward(library, torch.ones_like(x), x, w, 8).isfinite().all()


def test_two_calls_give_the_same_bits(library):
    x = truth.draw(2, 2, 20, 23)
    runs = []
    for _ in range(2):
        w, residual = forward(library, x)
        runs.append((w, residual, backward(library, draw_grad(x), x, w, 4)))
    assert all(map(torch.equal, *runs))


def test_reasons_and_bad_sizes():
    from lipfast import backends
    from lipfast.ops import polar_cuda

    extension = backends.extension()
    if extension is None:
        pytest.skip("lipfast._C is not built")
    assert polar_cuda.size_can_run(2, 64, 128) is None
    assert "up to 64 rows" in polar_cuda.size_can_run(1, 65, 65)
    assert "bytes of shared memory" in polar_cuda.size_can_run(2, 64, 300)
    assert "may have 49152" in polar_cuda.size_can_run(2, 64, 64, limit=48 * 1024)
    compiled = torch.compile(
        lambda x: x + (polar_cuda.size_can_run(1, *x.shape) is None),
        fullgraph=True,
        backend="aot_eager",
    )
    assert compiled(torch.zeros(3, 4)).all()
    sizes = {"batch": 1, "planes": 2, "rows": 3, "columns": 4, "steps": 1, "schedule": []}
    addresses = dict.fromkeys(["x", "grad", "w", "out"], 16)
    extension.PolarParams(**addresses, **sizes)
    for wrong in (
        *[{"batch": -1}, {"planes": 3}, {"rows": 5}, {"rows": 65, "columns": 65}, {"steps": 0}],
        *[{"schedule": [(1, 1, 1)] * 2}, {"steps": 17, "schedule": [(1, 1, 1)] * 17}],
    ):
        with pytest.raises(ValueError, match="polar: "):
            extension.PolarParams(**addresses, **(sizes | wrong))
    with pytest.raises(ValueError, match="only grad may be null"):
        extension.PolarParams(**(addresses | {"w": 0}), **sizes)


@needs_nvcc
def test_nvcc_compiles_without_spills(tmp_path, check_baseline):
    option = "--expt-relaxed-constexpr"  # as in CMakeLists.txt
    kernels = nvcc_resources("polar", 90, tmp_path / "polar.cubin", option)
    assert len(kernels) == 2 * 2 * 3  # (forward, backward) x (real, complex) x (1, 2, 4 a thread)
    for taken in kernels.values():
        assert taken["stack"] == taken["spill_stores"] == taken["spill_loads"] == 0
        assert taken["registers"] <= 255
    check_baseline("cuda", {f"{name} sm_90": taken for name, taken in kernels.items()})
