"""Every op in the form in which the papers publish it: plain PyTorch, never optimised."""

from .block_conv import block_conv
from .cayley import cayley
from .conv_norm import (
    conv_norm_bound,
    power_iteration,
    schatten_bound,
    torus_bound,
    unfolding_bound,
)
from .convolution import circular_pad, conv2d, conv2d_same, conv2d_same_adjoint, transpose_kernel
from .fourier_conv import fourier_conv, kernel_spectrum
from .gram_bound import aol_rescale, gram_bound, inverse_or_zero
from .polar import bjorck, polar
from .residual_conv import residual_conv
from .skew_exp import skew_exp, skew_kernel, taylor_supremum
from .sound import contract, round_contraction, unit_scale

__all__ = [
    "unit_scale",
    "round_contraction",
    "contract",
    "inverse_or_zero",
    "aol_rescale",
    "bjorck",
    "block_conv",
    "cayley",
    "circular_pad",
    "conv2d",
    "conv2d_same",
    "conv2d_same_adjoint",
    "conv_norm_bound",
    "fourier_conv",
    "gram_bound",
    "kernel_spectrum",
    "polar",
    "power_iteration",
    "residual_conv",
    "schatten_bound",
    "skew_exp",
    "skew_kernel",
    "taylor_supremum",
    "torus_bound",
    "transpose_kernel",
    "unfolding_bound",
]
