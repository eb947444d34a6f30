"""The networks of "1-Lipschitz Layers Compared", and the checkpoints of its published code."""

from .convnet import SIZES, ConvNet
from .published import load_published, published_state_dict

__all__ = ["SIZES", "ConvNet", "load_published", "published_state_dict"]
