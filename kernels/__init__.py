"""Triton kernels, one module per op, installed as `lipfast.kernels`."""
