"""How each method looks in every plot: colour, marker, line and hatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from lipfast.report.results import MethodResult


@dataclass(frozen=True)
class Style:
    """A look that can be told from the others in colour, for the colour-blind, and in grey."""

    color: str
    marker: str
    line: Any
    hatch: str


# Colours of Okabe and Ito without yellow, which is too pale for a line on white.
STYLES = {
    "aol": Style("#0072B2", "o", "solid", ""),
    "bcop": Style("#E69F00", "s", (0, (6, 2)), "///"),
    "cayley": Style("#009E73", "^", (0, (1, 1.5)), "..."),
    "cpl": Style("#D55E00", "D", (0, (6, 2, 1, 2)), "xxx"),
    "lot": Style("#CC79A7", "v", (0, (3, 1.5)), "\\\\\\"),
    "sll": Style("#56B4E9", "P", (0, (8, 1.5, 1, 1.5, 1, 1.5)), "---"),
    "soc": Style("#000000", "X", (0, (2, 3)), "||"),
}

# Text stays text in SVG, and the same data give the same file.
RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lipfast",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 10,
    "hatch.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def styles(results: Sequence[MethodResult]) -> dict[str, Style]:
    """Return one style per method key; a known method looks the same in every comparison."""
    spare = [style for method, style in STYLES.items() if method not in {r.method for r in results}]
    others = cycle(spare or STYLES.values())
    return {r.method: STYLES.get(r.method) or next(others) for r in results}
