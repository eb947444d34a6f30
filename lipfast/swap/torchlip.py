"""Rules for the layers of deel-torchlip."""

from .rules import Rule

RULES: tuple[Rule, ...] = ()
