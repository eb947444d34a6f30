"""The activation of the networks."""

from torch import Tensor, nn

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
