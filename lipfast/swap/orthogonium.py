"""Rules for the layers of orthogonium."""

from .rules import Rule

RULES: tuple[Rule, ...] = ()
