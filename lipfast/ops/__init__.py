"""The operations of the layers as functions of tensors, each with a choice of backends."""

from .block_conv import block_conv
from .gram_bound import gram_bound
from .maxmin import maxmin
from .residual_conv import residual_conv

__all__ = ["block_conv", "gram_bound", "maxmin", "residual_conv"]
