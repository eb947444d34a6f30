"""The paper's network with the convolutions of other packages, and with plain ones."""

from collections.abc import Callable

import torch
from torch import nn

from lipfast.models import ConvNet
from lipfast.nn import LipschitzConv2d, LipschitzLinear

Make = Callable[[int, int], nn.Module]  # channels and kernel size to a layer that keeps both


def network(method: str, size: str, make: Make | None, **options) -> nn.Module:
    """Return ConvNet with its convolutions made by `make`; its own where that is None."""
    net = ConvNet(method, size, **options)
    if make is not None:
        for name, layer in list(net.named_modules()):
            if isinstance(layer, LipschitzConv2d):
                parent, _, child = name.rpartition(".")
                new = make(layer.out_channels, layer.kernel_size[0])
                setattr(net.get_submodule(parent), child, new)
    return net


def plain_network(size: str, device: str) -> nn.Module:
    """Return ConvNet of nn.Conv2d and nn.Linear."""
    net = network("aol", size, lambda c, k: nn.Conv2d(c, c, k, padding=k // 2), device=device)
    for name, layer in list(net.named_children()):
        if isinstance(layer, LipschitzLinear):
            setattr(net, name, nn.Linear(layer.in_features, layer.out_features))
    return net.to(device)


def peers(method: str) -> dict[str, Make]:
    """Return the convolutions that other installed packages have for a method, by their names.

    orthogonium has five of the seven. Its linear layers are orthogonal ones, so that the networks
    keep lipfast's. Its BCOP needs a GPU, and its SOC (whose kernel grows with the terms) maps of at
    least 7 x 7, which the network has not. deel-torchlip has none of the seven.
    """
    try:
        from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
        from orthogonium.layers.conv.AOL import AOLConv2D
        from orthogonium.layers.conv.SLL import SDPBasedLipschitzResBlock
        from orthogonium.legacy.block_ortho_conv import BCOP
        from orthogonium.legacy.cayley_ortho_conv import Cayley
    except ImportError:
        return {}
    circular = {"padding_mode": "circular"}
    known: dict[str, dict[str, Make]] = {
        "aol": {"orthogonium": lambda c, k: AOLConv2D(c, c, k, padding=k // 2, **circular)},
        "bcop": {"orthogonium AOC": lambda c, k: AdaptiveOrthoConv2d(c, c, k, **circular)},
        "cayley": {"orthogonium": lambda c, k: Cayley(c, c, k)},
        "sll": {"orthogonium": lambda c, k: SDPBasedLipschitzResBlock(c, 1, k)},
    }
    if torch.cuda.is_available():
        known["bcop"]["orthogonium BCOP"] = lambda c, k: BCOP(c, c, k, padding=k // 2)
    return known.get(method, {})
