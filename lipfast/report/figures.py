"""Figures as files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from lipfast.report.style import RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def svg_text(figure: Figure) -> str:
    """Return a figure as SVG with its text as text; the same figure gives the same SVG."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write a figure as `stem`.png and `stem`.svg and return both paths."""
    import matplotlib

    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    with matplotlib.rc_context(RC):
        figure.savefig(png, format="png", dpi=DPI)
    svg.write_text(svg_text(figure), encoding="utf-8")
    return png, svg
