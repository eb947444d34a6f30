"""Arguments of skew_exp, and its value with its derivatives."""

from collections.abc import Callable

import torch
from torch import Tensor

from lipfast import reference

F64 = torch.float64
U5 = reference.unimodular_coefficients(5, 2.1)
T4 = reference.taylor_coefficients(4)


def arguments(
    shape: tuple[int, ...] = (2, 3, 4, 5), k: int = 3, *, dtype: torch.dtype = F64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """x, and the kernel of a skew convolution of norm at most 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=F64)
    weight = torch.randn(shape[1], shape[1], k, k, generator=generator, dtype=F64)
    kernel = reference.skew_kernel(weight)
    kernel = kernel * (2 * reference.inverse_or_zero(reference.torus_bound(kernel, grid=16)))
    return x.to(dtype).requires_grad_(), kernel.to(dtype).requires_grad_()


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], *rest, **options):
    y = function(*inputs, *rest, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    return [y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))]
