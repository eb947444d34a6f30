"""Swap lipfast layers into existing networks."""

from .accelerate import accelerate
from .report import Entry, SwapReport
from .rules import Replacement, Rule, Unsupported

__all__ = ["Entry", "Replacement", "Rule", "SwapReport", "Unsupported", "accelerate"]
