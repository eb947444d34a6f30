"""The operations of the layers as functions of tensors, each with a choice of backends."""

from .aol_rescale import aol_rescale
from .block_conv import block_conv
from .cayley import cayley
from .conv_norm import conv_norm
from .conv_norm_bound import conv_norm_bound
from .conv_norm_map import conv_norm_map_bound
from .fourier_conv import fourier_conv
from .fourier_conv_spectrum import kernel_spectrum
from .gram_bound import gram_bound
from .maxmin import maxmin
from .polar import polar
from .residual_conv import residual_conv
from .skew_exp import skew_exp

__all__ = [
    "aol_rescale",
    "block_conv",
    "cayley",
    "conv_norm",
    "conv_norm_bound",
    "conv_norm_map_bound",
    "fourier_conv",
    "gram_bound",
    "kernel_spectrum",
    "maxmin",
    "polar",
    "residual_conv",
    "skew_exp",
]
