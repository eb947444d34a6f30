"""1-Lipschitz layers with the signatures of `torch.nn.Conv2d` and `torch.nn.Linear`."""

from typing import NamedTuple

from .aol import AOLConv2d, AOLLinear
from .base import LipschitzModule
from .basic import FirstChannels, PixelUnshuffle, ZeroChannelPad
from .bcop import BCOPConv2d, BCOPLinear, BjorckLinear
from .cayley import CayleyConv2d, CayleyLinear
from .layers import LipschitzConv2d, LipschitzLinear
from .lot import LOTConv2d, LOTLinear
from .maxmin import MaxMin
from .residual import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from .soc import SOCConv2d, SOCLinear


class Method(NamedTuple):
    """The name and the layers of a method."""

    label: str
    conv: type[LipschitzConv2d]
    linear: type[LipschitzLinear]


METHODS: dict[str, Method] = {
    "aol": Method("AOL", AOLConv2d, AOLLinear),
    "bcop": Method("BCOP", BCOPConv2d, BCOPLinear),
    "cayley": Method("Cayley", CayleyConv2d, CayleyLinear),
    "cpl": Method("CPL", CPLConv2d, CPLLinear),
    "lot": Method("LOT", LOTConv2d, LOTLinear),
    "sll": Method("SLL", SLLConv2d, SLLLinear),
    "soc": Method("SOC", SOCConv2d, SOCLinear),
}

__all__ = [
    "METHODS",
    "AOLConv2d",
    "AOLLinear",
    "BCOPConv2d",
    "BCOPLinear",
    "BjorckLinear",
    "CPLConv2d",
    "CPLLinear",
    "CayleyConv2d",
    "CayleyLinear",
    "FirstChannels",
    "LOTConv2d",
    "LOTLinear",
    "LipschitzConv2d",
    "LipschitzLinear",
    "LipschitzModule",
    "MaxMin",
    "Method",
    "PixelUnshuffle",
    "SLLConv2d",
    "SLLLinear",
    "SOCConv2d",
    "SOCLinear",
    "ZeroChannelPad",
]
