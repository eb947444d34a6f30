"""aol_rescale on the CUDA kernels of lipfast._C."""

import torch
from torch import Tensor

from lipfast import backends

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # csrc/dtype.h


def aol_rescale_forward(weight: Tensor, r: Tensor, out: Tensor) -> None:
    """Write weight r^(-1/2) into out.

    Args:
        weight: (n, o, c, taps), contiguous, float64 or float32.
        r: (n, c), contiguous, dtype of weight.
        out: (n, o, c, taps), memory (n, o, c, taps) or (n, o, taps, c), written.
    """
    _run("aol_rescale_forward_cuda", weight, r, out, None, None)


def aol_rescale_backward(grad: Tensor, weight: Tensor, r: Tensor, out: Tensor) -> Tensor:
    """Write dL/dweight into out, contiguous, and return the sums over it times weight, (n, c).

    dL/dr is -1 / (2 r) times these sums. Arguments as in the forward, grad of any dtype and
    strides.
    """
    if not (grad.is_contiguous() or grad.mT.is_contiguous()):
        grad = grad.contiguous()
    n, rows, channels, _ = weight.shape
    # Sums over the rows of each part: added up in a fixed order.
    parts = -(-rows // backends.extension().aol_rescale_rows)
    partial = r.new_empty(n, parts, channels)
    _run("aol_rescale_backward_cuda", weight, r, grad, out, partial)
    return partial.sum(dim=1)


def _run(
    function: str,
    weight: Tensor,
    r: Tensor,
    scaled: Tensor,
    grad_weight: Tensor | None,
    partial: Tensor | None,
) -> None:
    extension = backends.extension()
    n, rows, channels, taps = weight.shape
    params = extension.AolRescaleParams(
        weight=weight.data_ptr(),
        r=r.data_ptr(),
        scaled=scaled.data_ptr(),
        grad_weight=0 if grad_weight is None else grad_weight.data_ptr(),
        partial=0 if partial is None else partial.data_ptr(),
        n=n,
        rows=rows,
        channels=channels,
        taps=taps,
        channels_last=not scaled.is_contiguous(),
        is_double=weight.dtype == torch.float64,
        dtype=_DTYPES.index(scaled.dtype),
    )
    with torch.cuda.device(weight.device):
        stream = torch.cuda.current_stream(weight.device).cuda_stream
        getattr(extension, function)(params, stream)
