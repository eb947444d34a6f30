"""A comparison as a table: for the terminal, in Markdown, and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import TYPE_CHECKING, NamedTuple

from lipfast.report.metrics import Metric, all_metrics, bound_text, parameter_count
from lipfast.report.radii import radius_label
from lipfast.report.results import Comparison, MethodResult

if TYPE_CHECKING:
    from rich.table import Table


class Cell(NamedTuple):
    """A text in the table, and whether it is the best of its column."""

    text: str
    best: bool = False


def terminal_table(comparison: Comparison) -> Table:
    """Return the table of all methods and metrics for a rich console, the best values bold.

    It fits in 80 columns. A failed method keeps its row; reasons stand in `failure_lines`.
    """
    from rich.table import Table
    from rich.text import Text

    metrics = all_metrics(comparison)
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("method\n", no_wrap=True)
    table.add_column("params\n", justify="right", no_wrap=True)
    for metric in metrics:
        table.add_column(_SHORT.get(metric.key) or _certified_head(metric), justify="right")
    for result in comparison.results:
        if result.failed:
            table.add_row(result.label, "failed", *[""] * len(metrics), style="red")
            continue
        cells = []
        for metric in metrics:
            style = "bold" if is_best(metric, result, comparison) else ""
            cells.append(Text(metric.text(result), style=style))
        table.add_row(result.label, parameter_count(result.n_parameters), *cells)
    return table


def markdown_table(comparison: Comparison) -> str:
    """Return the table in Markdown with aligned columns, the best values bold."""
    head, rows = table_cells(comparison)
    lines = [head]
    for row in rows:
        lines.append([f"**{cell.text}**" if cell.best else cell.text for cell in row])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [_markdown_line(lines[0], widths)]
    text.append("|" + "|".join(_rule(i, width) for i, width in enumerate(widths)) + "|")
    text += [_markdown_line(line, widths) for line in lines[1:]]
    failures = failure_lines(comparison)
    if failures:
        text += ["", *(f"- {line}" for line in failures)]
    return "\n".join(text) + "\n"


def csv_table(comparison: Comparison) -> str:
    """Return one CSV row per method with every field of its result, times in seconds."""
    names = [f.name for f in dataclasses.fields(MethodResult) if f.name != "certified"]
    at = names.index("accuracy") + 1
    radii = comparison.radii
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    certified = [f"certified_{radius_label(radius)}" for radius in radii]
    writer.writerow([*names[:at], *certified, *names[at:]])
    for result in comparison.results:
        row = ["" if (v := getattr(result, name)) is None else v for name in names]
        row[at:at] = [result.certified.get(radius, "") for radius in radii]
        writer.writerow(row)
    return out.getvalue()


def table_cells(comparison: Comparison) -> tuple[list[str], list[list[Cell]]]:
    """Return the head of the table and its rows, one per method."""
    metrics = all_metrics(comparison)
    head = ["Method", "Parameters", "Epochs", *(f"{m.name} ({m.unit})" for m in metrics)]
    head += ["Largest layer bound"]
    rows = []
    for result in comparison.results:
        row = [Cell(result.label), Cell(parameter_count(result.n_parameters))]
        row += [Cell("failed" if result.failed else str(result.epochs))]
        row += [Cell(m.text(result), is_best(m, result, comparison)) for m in metrics]
        row += [Cell(bound_text(result.layer_bound_max))]
        rows.append(row)
    return head, rows


def is_best(metric: Metric, result: MethodResult, comparison: Comparison) -> bool:
    """Return whether a result shows the best value of a metric, as printed, among several."""
    best = metric.best(comparison.finished)
    value = metric.value(result)
    if result.failed or best is None or value is None or len(comparison.finished) < 2:
        return False
    return metric.format(value) == metric.format(best)


def failure_lines(comparison: Comparison) -> list[str]:
    """Return one line per failed method with the reason."""
    return [f"{r.label} failed: {' '.join(str(r.error).split())}" for r in comparison.failures]


_SHORT = {
    "train_time": "train\ns/epoch",
    "inference_time": "infer\nµs/img",
    "train_memory": "train\nMiB",
    "inference_memory": "infer\nMiB",
    "accuracy": "acc.\n%",
}


def _certified_head(metric: Metric) -> str:
    return "cert. %\n" + metric.name.removeprefix("Certified at ")


def _markdown_line(cells: list[str], widths: list[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join(padded) + " |"


def _rule(column: int, width: int) -> str:
    return "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
