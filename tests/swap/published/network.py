"""The network of the paper, with its module names."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from .dense import BnBLinearBCOP, CayleyLinear
from .kernels import BCOP, AOLConv2d
from .residual import SOC, CPLConv2d, MaxMin, SLLConv2d
from .spectral import LOT, CayleyConv

LAYERS: dict[str, type[nn.Module]] = {
    "aol": AOLConv2d,
    "bcop": BCOP,
    "cayley": CayleyConv,
    "cpl": CPLConv2d,
    "lot": LOT,
    "sll": SLLConv2d,
    "soc": SOC,
}
HEADS: dict[str, type[nn.Module]] = {"bcop": BnBLinearBCOP, "cayley": CayleyLinear}


class ZeroChannelConcatenation(nn.Module):
    def __init__(self, concatenate_to):
        super().__init__()
        self.concatenate_to = concatenate_to

    def forward(self, x):
        missing = self.concatenate_to - x.shape[1]
        return torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), 1)


class FirstChannels(nn.Module):
    def __init__(self, nrof_channels):
        super().__init__()
        self.nrof_channels = nrof_channels

    def forward(self, x):
        return x[:, : self.nrof_channels]


def network(method: str, *, width: int = 16, blocks: int = 5, layers: int = 5) -> nn.Sequential:
    """The network for maps of 2^blocks pixels: XS by default."""
    conv: Callable[..., nn.Module] = LAYERS[method]
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["ZeroConcatenation"] = ZeroChannelConcatenation(width)
    parts["FirstConv"] = conv(width, width, 1)
    parts["FirstActivation"] = MaxMin()
    for i in range(blocks):
        c = width * 2**i
        kernel_size = 1 if i == blocks - 1 else 3
        block = [m for _ in range(layers) for m in (conv(c, c, kernel_size), MaxMin())]
        block += [FirstChannels(c // 2), nn.PixelUnshuffle(2)]
        parts[f"Block{i + 1}"] = nn.Sequential(*block)
    features = width * 2**blocks
    parts["AdaptiveMaxPool"] = nn.AdaptiveMaxPool2d(1)
    if method in HEADS:
        head = nn.Sequential(nn.Flatten(), HEADS[method](features, features))
    else:
        head = nn.Sequential(conv(features, features, 1), nn.Flatten())
    parts["ClassificationHead"] = head
    parts["FirstChannels"] = FirstChannels(10)
    return nn.Sequential(parts)


def forget_weights(model: nn.Module) -> None:
    """Clear what the layers cache: it survives steps of an optimizer and forbids copies."""
    names = ("weight", "w_cached", "val_cache", "val_rescaling_cached", "Q_cached")
    for module in model.modules():
        module.__dict__.update({name: None for name in names if name in module.__dict__})
        module.__dict__.pop("shift_matrix", None)  # of another dtype after .double()
