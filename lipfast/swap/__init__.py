"""Swap lipfast layers into existing networks."""

from .accelerate import accelerate
from .convert import convert
from .convert_report import ConvertReport, Step
from .report import Entry, SwapReport
from .rules import Replacement, Rule, Unsupported

__all__ = [
    "ConvertReport",
    "Entry",
    "Replacement",
    "Rule",
    "Step",
    "SwapReport",
    "Unsupported",
    "accelerate",
    "convert",
]
