"""The published layers of "1-Lipschitz Layers Compared", declared again from their description.

Class names, attribute names, parameters, buffers and formulas are those of the code that was
published with the paper (github.com/berndprach/1LipschitzLayersCompared), defects included.
"""

from .dense import BjorckLinear, BnBLinearBCOP, CayleyLinear
from .kernels import BCOP, AOLConv2d
from .network import LAYERS, forget_weights, network
from .residual import SOC, CPLConv2d, MaxMin, SLLConv2d
from .spectral import LOT, CayleyConv

__all__ = [
    "BCOP",
    "LAYERS",
    "LOT",
    "SOC",
    "AOLConv2d",
    "BjorckLinear",
    "BnBLinearBCOP",
    "CPLConv2d",
    "CayleyConv",
    "CayleyLinear",
    "MaxMin",
    "SLLConv2d",
    "forget_weights",
    "network",
]
