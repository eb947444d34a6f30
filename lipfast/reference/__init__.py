"""Every op in the form in which the papers publish it: plain PyTorch, never optimised."""

from .block_conv import block_conv
from .cayley import cayley
from .conv_norm import power_iteration, schatten_bound, torus_bound, unfolding_bound
from .convolution import circular_pad, conv2d, conv2d_same, conv2d_same_adjoint, transpose_kernel
from .fourier_conv import fourier_conv, kernel_spectrum
from .gram_bound import aol_rescale, gram_bound, inverse_or_zero
from .polar import bjorck, polar
from .residual_conv import residual_conv
from .series import (
    Coefficients,
    contracting,
    polynomial_supremum,
    taylor_coefficients,
    taylor_supremum,
    unimodular_coefficients,
)
from .skew_exp import (
    matrix_polynomial,
    skew_exp,
    skew_kernel,
    skew_norm_bound,
    skew_polynomial,
    skew_power_iteration,
)
from .sound import contract, round_contraction, unit_scale

__all__ = [
    "Coefficients",
    "unit_scale",
    "round_contraction",
    "contract",
    "contracting",
    "inverse_or_zero",
    "aol_rescale",
    "bjorck",
    "block_conv",
    "cayley",
    "circular_pad",
    "conv2d",
    "conv2d_same",
    "conv2d_same_adjoint",
    "fourier_conv",
    "gram_bound",
    "kernel_spectrum",
    "matrix_polynomial",
    "polar",
    "power_iteration",
    "residual_conv",
    "schatten_bound",
    "polynomial_supremum",
    "skew_exp",
    "skew_kernel",
    "skew_norm_bound",
    "skew_polynomial",
    "skew_power_iteration",
    "taylor_coefficients",
    "taylor_supremum",
    "torus_bound",
    "transpose_kernel",
    "unimodular_coefficients",
    "unfolding_bound",
]
