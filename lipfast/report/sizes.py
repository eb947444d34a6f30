"""One comparison per network size in one table, in the layout of the paper's 24-hour table."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lipfast.models import SIZES
from lipfast.nn import METHODS
from lipfast.report import published
from lipfast.report.metrics import HEADLINE_RADIUS
from lipfast.report.results import Comparison, MethodResult

_PAPERS_SET = "cifar10"


def sizes_table(comparisons: dict[str, Comparison]) -> str:
    """Return Markdown: a row per method, a column per size, accuracy / certified at 36/255.

    On CIFAR-10 the figures that the paper published for 24 hours stand below in italics. A failed
    method shows "failed".

    Args:
        comparisons: by size, XS to L, of one data set.
    """
    sizes = [size for size in SIZES if size in comparisons]
    with_paper = {c.dataset for c in comparisons.values()} == {_PAPERS_SET}
    lines = [
        "Accuracy / certified robust accuracy at 36/255, percent"
        + (
            "; in italics the published ones (24 hours on an A100, the authors' code)."
            if with_paper
            else "."
        ),
        "",
        "| method | " + " | ".join(sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for method in METHODS:
        cells = [_cell(_result(comparisons[size], method)) for size in sizes]
        if not any(cells):
            continue
        lines.append(f"| {METHODS[method].label} | " + " | ".join(cells) + " |")
        if with_paper:
            old = [_published(method, size) for size in sizes]
            lines.append("| | " + " | ".join(old) + " |")
    return "\n".join(lines) + "\n"


def sizes_csv(comparisons: dict[str, Comparison]) -> str:
    """Return one CSV row per method and size, fractions as they are, empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "size", "epochs", "accuracy", "certified_36_255", "error"])
    for size, comparison in comparisons.items():
        for result in comparison.results:
            certified = result.certified.get(HEADLINE_RADIUS)
            writer.writerow(
                [result.method, size, result.epochs, result.accuracy, certified, result.error]
            )
    return text.getvalue()


def write_sizes(comparisons: dict[str, Comparison], folder: Path | str) -> list[Path]:
    """Write sizes.md and sizes.csv into a folder and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"sizes.md": sizes_table(comparisons), "sizes.csv": sizes_csv(comparisons)}
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in texts]


def _result(comparison: Comparison, method: str) -> MethodResult | None:
    return next((r for r in comparison.results if r.method == method), None)


def _cell(result: MethodResult | None) -> str:
    if result is None:
        return ""
    if result.failed or result.accuracy is None:
        return "failed"
    certified = result.certified.get(HEADLINE_RADIUS)
    second = "–" if certified is None else f"{100 * certified:.1f}"
    return f"{100 * result.accuracy:.1f} / {second}"


def _published(method: str, size: str) -> str:
    figures = published.ACCURACY[method][list(SIZES).index(size)]
    return "*out of memory*" if figures is None else f"*{figures[0]:.1f} / {figures[1]:.1f}*"
