"""Layers without parameters that are 1-Lipschitz by themselves."""

import torch.nn.functional as F
from torch import Tensor, fx, nn

from .kernel import pixel_unshuffle
from .layers import positive_int


class _NonExpansive(nn.Module):
    def lipschitz_bound(self) -> float:
        """Return 1: outputs are entries of the input, each at most once, and zeros."""
        return 1.0


class FirstChannels(_NonExpansive):
    """Keep the first `channels` entries of dimension 1 (n, c, ...), c >= channels.

    Raises:
        ValueError: the input has fewer channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels, "FirstChannels")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] < self.channels:
            raise ValueError(
                f"input: FirstChannels expected (n, c >= {self.channels}, ...), "
                f"got shape {tuple(x.shape)}"
            )
        return x[:, : self.channels]

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def to_plain(self) -> nn.Module:
        """Return an equivalent module of torch operations."""
        return fx.symbolic_trace(_PlainFirstChannels(self.channels))


class ZeroChannelPad(_NonExpansive):
    """Append zero channels to (n, c, h, w) up to `channels` >= c.

    Raises:
        ValueError: the input has more channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels, "ZeroChannelPad")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] > self.channels:
            raise ValueError(
                f"input: ZeroChannelPad expected (n, c <= {self.channels}, h, w), "
                f"got shape {tuple(x.shape)}"
            )
        return F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def to_plain(self, channels: int | None = None) -> nn.Module:
        """Return an equivalent module of torch operations.

        Args:
            channels: of every input; None for any number, of which more than the sum are cut off.
        """
        if channels is not None:
            return nn.ZeroPad3d((0, 0, 0, 0, 0, self.channels - channels))
        return fx.symbolic_trace(_PlainZeroChannelPad(self.channels))


class PixelUnshuffle(_NonExpansive, nn.PixelUnshuffle):
    """`torch.nn.PixelUnshuffle`, a permutation, with the right shape for an empty batch too."""

    def forward(self, input: Tensor) -> Tensor:
        return pixel_unshuffle(input, self.downscale_factor)

    def to_plain(self) -> nn.Module:
        """Return `torch.nn.PixelUnshuffle`, which refuses an empty batch."""
        return nn.PixelUnshuffle(self.downscale_factor)


class _PlainFirstChannels(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(1, 0, self.channels)


class _PlainZeroChannelPad(_PlainFirstChannels):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.channels - x.shape[1]))
