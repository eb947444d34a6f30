"""Orthogonal convolution kernels from projectors (BCOP: Li et al. 2019)."""

import torch
from torch import Tensor


def block_conv(factor: Tensor, projectors: Tensor) -> Tensor:
    """Return the kernel of H followed by the 2x2 block convolutions of pairs of projectors.

    K = H * v(P_1) * h(P_2) * v(P_3) * ..., where v(P) has the taps [P; I - P] on top of each
    other and h(P) the taps [P, I - P] side by side (BCOP, algorithm 1). Orthogonal where H is
    and each P is an orthogonal projector; of norm at most norm(H) where each P is symmetric with
    eigenvalues in [0, 1].

    Args:
        factor: H, (out, c).
        projectors: (2 (k - 1), c, c), vertical and horizontal in turn.

    Returns:
        (out, c, k, k), k = 1 + number of projectors / 2.
    """
    kernel = factor[:, :, None, None]
    for index, projector in enumerate(projectors):
        dim = 2 if index % 2 == 0 else 3
        kept = torch.einsum("oixy,ij->ojxy", kernel, projector)
        zero = torch.zeros_like(kernel.narrow(dim, 0, 1))
        kernel = torch.cat([kept, zero], dim) + torch.cat([zero, kernel - kept], dim)
    return kernel
