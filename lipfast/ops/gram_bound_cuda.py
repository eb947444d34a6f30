"""gram_bound on the CUDA kernels of lipfast._C."""

import torch
from torch import Tensor

from lipfast import backends


def gram_bound_forward(taps: Tensor, q: Tensor, signs: Tensor) -> Tensor:
    """Return q_i r_i (batch, c), and write the signs of the correlations.

    Args:
        taps: (batch, kh, kw, c, n), float64 or float32, channels to correlate before those to sum
            over.
        q: (batch, c), contiguous.
        signs: int8 (batch, c, offsets, c), contiguous, written.
    """
    batch, _, _, channels, _ = taps.shape
    tiles = -(-channels // backends.extension().gram_bound_tile)
    # Sums over the columns, then over the rows, of each tile: added up in a fixed order.
    partial = taps.new_empty(batch, 2, signs.shape[2], tiles, channels)
    _run("gram_bound_forward_cuda", taps.mT.contiguous(), None, q, signs, partial)
    return partial.sum(dim=(1, 2, 3))


def gram_bound_backward(taps: Tensor, signs: Tensor, a: Tensor, q: Tensor, grad: Tensor) -> None:
    """Write dL/dtaps into grad (batch, kh, kw, c, n), for a = dL/dr / q (batch, c), contiguous."""
    turned = taps.mT.contiguous()
    out = torch.empty_like(turned)
    _run("gram_bound_backward_cuda", turned, a, q, signs, out)
    grad.copy_(out.mT)


def gram_bound_params(  # type: ignore[no-untyped-def]
    size: tuple[int, ...],
    taps: Tensor | None,
    a: Tensor | None,
    q: Tensor,
    signs: Tensor,
    out: Tensor,
):
    """Return csrc/gram_bound.h: GramBoundParams, for taps of the size (batch, kh, kw, c, n)."""
    batch, kh, kw, channels, depth = size
    return backends.extension().GramBoundParams(
        taps=0 if taps is None else taps.data_ptr(),
        a=0 if a is None else a.data_ptr(),
        q=q.data_ptr(),
        signs=signs.data_ptr(),
        out=out.data_ptr(),
        batch=batch,
        channels=channels,
        depth=depth,
        kh=kh,
        kw=kw,
        is_double=out.dtype == torch.float64,
    )


def _run(
    function: str, taps: Tensor, a: Tensor | None, q: Tensor, signs: Tensor, out: Tensor
) -> None:
    params = gram_bound_params(taps.mT.shape, taps, a, q, signs, out)
    with torch.cuda.device(taps.device):
        stream = torch.cuda.current_stream(taps.device).cuda_stream
        getattr(backends.extension(), function)(params, stream)
