"""The operations of the layers as functions of tensors, each with a choice of backends."""

from .block_conv import block_conv
from .conv_norm import conv_norm
from .gram_bound import gram_bound
from .maxmin import maxmin
from .polar import polar
from .residual_conv import residual_conv
from .skew_exp import skew_exp

__all__ = ["block_conv", "conv_norm", "gram_bound", "maxmin", "polar", "residual_conv", "skew_exp"]
