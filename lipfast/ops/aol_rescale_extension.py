"""aol_rescale on the C++ and CUDA kernels of lipfast._C."""

import math

import torch
from torch import Tensor

from lipfast import backends

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # csrc/dtype.h


def aol_rescale_forward(
    weight: Tensor, r: Tensor, out: Tensor, groups: int, *, channels_last: bool
) -> None:
    """Write weight r^(-1/2) into out.

    Args:
        weight: kernel or kernels, contiguous, float64 or float32.
        r: contiguous, dtype of weight.
        out: of any floating-point dtype (no float16 on a CPU), written.
        groups: of the convolution.
        channels_last: whether memory of out holds (..., out, kh, kw, in / groups).
    """
    _run("forward", weight, r, out, None, None, groups, channels_last)


def aol_rescale_backward(
    grad: Tensor, weight: Tensor, r: Tensor, grad_weight: Tensor, grad_r: Tensor, groups: int
) -> None:
    """Write dL/dweight and dL/dr, contiguous, from grad, of any strides."""
    channels_last = grad.dim() >= 4 and grad.movedim(-3, -1).is_contiguous()
    if not channels_last:
        grad = grad.contiguous()
    if not weight.is_cuda:
        _run("backward", weight, r, grad, grad_weight, grad_r, groups, channels_last)
        return
    # Sums over the rows of each part: added up in a fixed order.
    first = weight.dim() % 2
    rows = weight.shape[first] // groups
    parts = -(-rows // backends.extension().aol_rescale_rows)
    sums = r.view(-1, weight.shape[first + 1])
    partial = r.new_empty(len(sums), parts, weight.shape[first + 1])
    _run("backward", weight, r, grad, grad_weight, partial, groups, channels_last)
    sums = partial.sum(dim=1).view(r.shape)
    grad_r.copy_(torch.where(r > 0, sums / (-2 * r), 0))


def _run(
    direction: str,
    weight: Tensor,
    r: Tensor,
    scaled: Tensor,
    grad_weight: Tensor | None,
    partial: Tensor | None,
    groups: int,
    channels_last: bool,
) -> None:
    extension = backends.extension()
    first = weight.dim() % 2
    rows, channels, *taps = weight.shape[first:]
    params = extension.AolRescaleParams(
        weight=weight.data_ptr(),
        r=r.data_ptr(),
        scaled=scaled.data_ptr(),
        grad_weight=0 if grad_weight is None else grad_weight.data_ptr(),
        partial=0 if partial is None else partial.data_ptr(),
        n=math.prod(weight.shape[:first]) * groups,
        rows=rows // groups,
        channels=channels,
        taps=math.prod(taps),
        channels_last=channels_last,
        is_double=weight.dtype == torch.float64,
        dtype=_DTYPES.index(scaled.dtype),
    )
    if not weight.is_cuda:
        getattr(extension, f"aol_rescale_{direction}_cpu")(params)
        return
    with torch.cuda.device(weight.device):
        stream = torch.cuda.current_stream(weight.device).cuda_stream
        getattr(extension, f"aol_rescale_{direction}_cuda")(params, stream)
