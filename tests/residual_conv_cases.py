"""Arguments of residual_conv."""

import torch
from torch import Tensor

F64 = torch.float64


def arguments(
    shape: tuple[int, ...] = (2, 3, 4, 5),
    hidden: int = 3,
    k: int | tuple[int, int] = 3,
    *,
    bias: bool = True,
    scalar: bool = False,
    dtype: torch.dtype = F64,
    seed: int = 0,
) -> list[Tensor | None]:
    """x, kernel, bias and scale, all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    kh, kw = (k, k) if isinstance(k, int) else k
    sizes = [shape, (hidden, shape[1], kh, kw), (hidden,) if bias else None]
    tensors = [
        None if size is None else torch.randn(size, generator=generator, dtype=F64)
        for size in sizes
    ]
    tensors.append(torch.rand(() if scalar else hidden, generator=generator, dtype=F64) + 0.1)
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
