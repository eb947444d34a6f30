"""Leading batch dimensions: several kernels at once give what each of them gives alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipfast import reference
from lipfast.ops import kernel_spectrum, polar

F64 = torch.float64


def assert_one_by_one(function: Callable[..., Tensor], *batches: Tensor) -> None:
    """Values and gradients of function(*batches) and of its calls for each element."""
    batches = tuple(b.detach().requires_grad_() for b in batches)
    together = function(*batches)
    alone = torch.stack([function(*ones) for ones in zip(*batches, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(alone)
    ours = torch.autograd.grad(together, batches, grad, allow_unused=True)
    theirs = torch.autograd.grad(alone, batches, grad, allow_unused=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("map_size", [(1, 1), (4, 5), (2, 3)])
@pytest.mark.parametrize("taps", [(3, 3), (2, 5), (1, 1)])
def test_kernel_spectrum(map_size, taps):
    kernels = torch.randn(3, 4, 2, *taps, dtype=F64)
    assert_one_by_one(lambda k: kernel_spectrum(k, map_size), kernels)
    spectra = kernel_spectrum(kernels, map_size)
    assert spectra.is_contiguous()
    assert spectra.shape == (3, map_size[0] * (map_size[1] // 2 + 1), 2, 4, 2)
    op = torch.ops.lipfast
    torch.library.opcheck(op.kernel_spectrum.default, (kernels.requires_grad_(), *map_size))
    adjoint = (spectra.detach().requires_grad_(), *taps, *map_size)
    torch.library.opcheck(op.kernel_spectrum_adjoint.default, adjoint)


def test_kernel_spectrum_in_transforms_and_of_none():
    kernels = torch.randn(3, 4, 2, 3, 3, dtype=F64)
    inside = torch.func.functionalize(lambda k: kernel_spectrum(k, (4, 5)))(kernels)
    torch.testing.assert_close(inside, kernel_spectrum(kernels, (4, 5)), rtol=1e-12, atol=1e-12)
    assert kernel_spectrum(kernels[:0], (4, 5)).shape == (0, 12, 2, 4, 2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("planar", [False, True])
def test_polar_with_a_ridge_for_each_matrix(planar, backend):
    planes = (2,) if planar else ()
    matrices = torch.randn(3, 2, *planes, 4, 5, dtype=F64)
    ridges = torch.tensor([1e-3, 0.0, 2.0], dtype=F64)[:, None]
    together = polar(matrices, planar=planar, ridge=ridges, backend=backend)
    for one, v, ridge in zip(together, matrices, ridges, strict=True):
        alone = polar(v, planar=planar, ridge=float(ridge), backend=backend)
        torch.testing.assert_close(one, alone, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"broadcasts with the batch \(3, 2\), got .*\(3,\)"):
        polar(matrices, planar=planar, ridge=ridges[:, 0], backend=backend)


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("taps", [1, 3])
def test_unfolding_bound(skew, taps):
    kernels = torch.randn(3, 4, 4, taps, taps, dtype=F64)
    assert_one_by_one(lambda k: reference.unfolding_bound(k, skew=skew), kernels)


@pytest.mark.parametrize(("taps", "side"), [(3, 4), (1, 1)])
def test_skew_power_iteration(taps, side):
    kernels = reference.skew_kernel(torch.randn(3, 4, 4, taps, taps, dtype=F64))
    vectors = torch.randn(3, 2, side * (side // 2 + 1), 4, dtype=F64)
    for part in (0, 1):

        def run(kernel: Tensor, vector: Tensor, part: int = part) -> Tensor:
            result = reference.skew_power_iteration(kernel, vector, side)[part]
            return result if part == 0 else result + 0 * kernel.sum()

        assert_one_by_one(run, kernels, vectors)
    one = reference.skew_kernel(kernels)[1]
    torch.testing.assert_close(one, reference.skew_kernel(kernels[1]))
