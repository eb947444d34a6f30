"""The activation of the networks."""

import torch
from torch import Tensor, fx, nn

from lipfast import ops


class MaxMin(nn.Module):
    """Order each pair of channels (2i, 2i + 1) as (max, min); an odd last channel passes through.

    Shapes (n, c, ...) in and out, same dtype, memory format and norm. See `lipfast.ops.maxmin`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return ops.maxmin(x)

    def lipschitz_bound(self) -> float:
        """Return 1: the map only permutes, so it keeps norms and does not expand distances."""
        return 1.0

    def to_plain(self, channels: int | None = None) -> nn.Module:
        """Return an equivalent module of torch operations.

        Args:
            channels: of every input, which saves a copy of the output; None for any number.
        """
        return fx.symbolic_trace(_PlainMaxMin(channels))


class _PlainMaxMin(nn.Module):
    """Traced into a maximum, a minimum and their interleaving; no shape depends on data."""

    def __init__(self, channels: int | None) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        pairs = 2 * ((x.shape[1] if self.channels is None else self.channels) // 2)
        first, second = x[:, 0:pairs:2], x[:, 1::2]
        larger, smaller = torch.maximum(first, second), torch.minimum(first, second)
        ordered = torch.stack([larger, smaller], 2).flatten(1, 2)
        if self.channels is not None and self.channels % 2 == 0:
            return ordered
        return torch.cat([ordered, x[:, pairs:]], 1)
