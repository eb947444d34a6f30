"""skew_exp in Triton: one implicit-GEMM convolution per term, with the sums in its epilogue."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .convolution import convolution_sum, pack_taps
from .launch import on_its_gpu


@on_its_gpu
def skew_exp_forward(
    x: Tensor,  # (n, c, h, w)
    kernel: Tensor,  # (c, c, kh, kw)
    ratios: Sequence[float],
    a0: float,
    padding_mode: str,
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y = a0 z_0 and the terms, z_n = x and z_(k-1) = x + r_k L z_k.

    Maps are computed in channels-last memory; x in other memory is copied first, and y back.

    Args:
        x: float32, bfloat16 or float16.
        kernel: of L, odd kh and kw; used in the dtype of x.
        ratios: r_1, ..., r_n.
        a0: factor of the result.
        padding_mode: "zeros" or "circular".
        keep: return the terms; without it two maps serve all of them.

    Returns:
        y, in the dtype and memory format of x, and z_1, ..., z_n, (len(ratios), n, c, h, w), each
        in channels-last memory; without `keep` their first axis is empty.
    """
    dense = x.contiguous(memory_format=torch.channels_last)
    steps = len(ratios)
    terms = _stack(steps if keep else 2, dense)
    y = torch.empty_like(dense)
    if keep and steps:
        terms[-1].copy_(dense)
    taps = pack_taps(kernel.to(x.dtype))
    last = dense
    for k in range(steps, 0, -1):  # z_k is last, in terms[k - 1]
        following = terms[(k - 2) if keep else k % 2] if k > 1 else y
        factor = a0 if k == 1 else 1.0
        convolution_sum(
            last, taps, padding_mode, following,
            beta=factor * ratios[k - 1], alpha=factor, addend=dense,
        )  # fmt: skip
        last = following
    if not steps:
        torch.mul(dense, a0, out=y)
    return _as(y, x), terms if keep else terms[:0]


@on_its_gpu
def skew_exp_backward(
    grad: Tensor,  # (n, c, h, w)
    kernel: Tensor,  # (c, c, kh, kw)
    ratios: Sequence[float],
    a0: float,
    padding_mode: str,
) -> tuple[Tensor, Tensor]:
    """Return dL/dx and t_1, ..., t_n: h = a0 grad, dL/dx = h; t_k = r_k h, h = -L t_k, dL/dx += h.

    The adjoint of L is -L: the kernel is used as it is. The derivative in the kernel is that of
    one convolution over all maps, from the terms of the forward pass to t_1, ..., t_n.

    Args:
        grad: dL/dy, as x of `skew_exp_forward`.
        kernel, ratios, a0, padding_mode: as in `skew_exp_forward`.

    Returns:
        dL/dx, in the dtype and memory format of grad, and t_1, ..., t_n, (len(ratios), n, c, h, w),
        each in channels-last memory.
    """
    dense = grad.contiguous(memory_format=torch.channels_last)
    steps = len(ratios)
    scaled = _stack(steps, dense)
    grad_x = torch.empty_like(dense)
    if not steps:
        torch.mul(dense, a0, out=grad_x)
        return _as(grad_x, grad), scaled
    torch.mul(dense, a0 * ratios[0], out=scaled[0])
    taps = pack_taps(kernel.to(grad.dtype))
    for k in range(1, steps + 1):
        last = k == steps
        convolution_sum(
            scaled[k - 1], taps, padding_mode, grad_x,
            beta=-1.0, alpha=a0 if k == 1 else 1.0, addend=dense if k == 1 else grad_x,
            gamma=0.0 if last else -ratios[k], second=None if last else scaled[k],
        )  # fmt: skip
    return _as(grad_x, grad), scaled


def _stack(count: int, like: Tensor) -> Tensor:
    """(count, n, c, h, w), each map in channels-last memory."""
    n, c, h, w = like.shape
    return like.new_empty(count, n, h, w, c).permute(0, 1, 4, 2, 3)


def _as(value: Tensor, like: Tensor) -> Tensor:
    """Value in the memory format of `like`."""
    return value if value.stride() == like.stride() else torch.empty_like(like).copy_(value)
