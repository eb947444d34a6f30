"""Rules for the published code of \"1-Lipschitz Layers Compared\" (Prach et al., CVPR 2024)."""

from .rules import Rule

RULES: tuple[Rule, ...] = ()
