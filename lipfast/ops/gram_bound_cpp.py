"""gram_bound on the CPU: matrix products by PyTorch, everything else by lipfast._C."""

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import gram_bound_gemm
from lipfast.ops.gram_bound_cuda import gram_bound_params

# Numbers in a kernel up to which one product of all taps with all, one for each row of taps with
# the later rows, and one with a matrix of all factors are fastest; measured for 3x3 kernels.
_ONE_PRODUCT_FORWARD = 9 * 40**2
_ROW_PRODUCTS_FORWARD = 9 * 112**2
_ONE_PRODUCT_BACKWARD = 9 * 112**2


def gram_bound_forward(taps: Tensor, q: Tensor, signs: Tensor) -> Tensor:
    """Return q_i r_i (batch, c), and write the signs of the correlations.

    Args:
        taps: (batch, kh, kw, c, n), float64 or float32, channels to correlate before those to sum
            over.
        q: (batch, c), contiguous.
        signs: int8 (batch, c, offsets, c), contiguous, written.
    """
    extension = backends.extension()
    if taps[0].numel() <= _ONE_PRODUCT_FORWARD:
        kernel = gram_bound_gemm.in_rows(taps)
        kind, products = extension.GramBoundProducts.ALL_TAPS, kernel.mT @ kernel
    elif taps[0].numel() <= _ROW_PRODUCTS_FORWARD:
        kind, products = extension.GramBoundProducts.ROWS, _row_products(taps)
    else:
        kind, products = extension.GramBoundProducts.SUMMED, gram_bound_gemm.correlate(taps)
    sums = torch.empty_like(q)
    params = gram_bound_params(taps.shape, products, None, q, signs, sums)
    extension.gram_bound_forward_cpu(params, kind)
    return sums


def gram_bound_backward(taps: Tensor, signs: Tensor, a: Tensor, q: Tensor, grad: Tensor) -> None:
    """Write dL/dtaps into grad (batch, kh, kw, c, n), for a = dL/dr / q (batch, c), contiguous."""
    batch, kh, kw, channels, depth = taps.shape
    matrix = taps[0].numel() <= _ONE_PRODUCT_BACKWARD
    side = kh * kw * channels
    factors = taps.new_empty((batch, side, side) if matrix else signs.shape)
    params = gram_bound_params(taps.shape, None, a, q, signs, factors)
    backends.extension().gram_bound_backward_cpu(params, matrix)
    if matrix:
        out = torch.bmm(gram_bound_gemm.in_rows(taps), factors)
        grad.copy_(out.view(batch, depth, kh, kw, channels).permute(0, 2, 3, 4, 1))
    else:
        gram_bound_gemm.expand(taps, factors.flatten(2), grad)


def _row_products(taps: Tensor) -> Tensor:
    """Products of the taps of each row with those of this and all later rows, in turn."""
    batch, kh, kw, channels, _ = taps.shape
    kernel, side = gram_bound_gemm.in_rows(taps), kw * channels
    sizes = [batch * side * row * side for row in range(kh, 0, -1)]
    products = taps.new_empty(sum(sizes))
    for row, part in enumerate(products.split(sizes)):
        later = kernel[:, :, row * side :]
        torch.bmm(later[:, :, :side].mT, later, out=part.view(batch, side, -1))
    return products
