"""Advice for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lipfast.report.advise import Advice, Budget, Candidate, Figure
from lipfast.report.metrics import significant

if TYPE_CHECKING:
    from rich.table import Table

_MARKS = {"measured": "m", "counted": "c", "published": "p"}


def advice_lines(advice: Advice, budget: Budget) -> Iterator[str]:
    """Yield the recommendation and its reasons, one sentence a line."""
    if not advice.fitting:
        yield "No method and size is known to fit."
        return
    best = advice.fitting[0]
    yield f"Recommended: {best.name}"
    if best.certified is not None:
        yield (
            f"It has the highest {best.certified.source} certified robust accuracy at 36/255 "
            f"({best.certified.value:.1f} %) of those that fit."
        )
    if budget.train_seconds is not None and best.epoch_seconds is not None:
        epochs = budget.train_seconds / best.epoch_seconds.value
        yield f"The training time is enough for {epochs:.0f} epochs ({best.epoch_seconds.source})."
    if best.unknown:
        yield f"Not known, and so not checked: {' and '.join(best.unknown)}."
    if budget.memory_bytes is not None and best.memory_bytes is not None:
        share = 100 * best.memory_bytes.value / budget.memory_bytes
        yield f"Training takes {share:.0f} % of the memory ({best.memory_bytes.source})."


def advice_table(advice: Advice) -> Table:
    """Return a rich table of what was looked at, each figure with the letter of its source."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("network", no_wrap=True)
    for head in ("cert. %", "acc. %", "s/epoch", "ms/image", "GiB"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("remark")
    for candidate in (*advice.fitting, *advice.rejected):
        table.add_row(*_cells(candidate), style="" if candidate.objection is None else "dim")
    table.caption = "m measured here, c counted, p published"
    table.caption_justify = "left"
    return table


def _cells(candidate: Candidate) -> list[str]:
    return [
        candidate.name,
        _text(candidate.certified),
        _text(candidate.accuracy),
        _text(candidate.epoch_seconds),
        _text(candidate.inference_seconds, 1e3),
        _text(candidate.memory_bytes, 1 / 2**30),
        candidate.objection or _remark(candidate),
    ]


def _remark(candidate: Candidate) -> str:
    return f"fits; {' and '.join(candidate.unknown)} unknown" if candidate.unknown else "fits"


def _text(figure: Figure | None, factor: float = 1.0) -> str:
    if figure is None:
        return "–"
    relation = {"=": "", "<=": "≤ ", ">=": "≥ "}[figure.relation]
    return f"{relation}{significant(factor * figure.value)} {_MARKS[figure.source]}"
