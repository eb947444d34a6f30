"""The operations of the layers as functions of tensors, each with a choice of backends."""

from .maxmin import maxmin

__all__ = ["maxmin"]
