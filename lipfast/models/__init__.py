"""The networks of "1-Lipschitz Layers Compared"."""

from .convnet import SIZES, ConvNet

__all__ = ["SIZES", "ConvNet"]
