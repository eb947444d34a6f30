"""All files of a report."""

from __future__ import annotations

from pathlib import Path

from lipfast.report.bars import bars_figure
from lipfast.report.figures import save_figure
from lipfast.report.html import html_report
from lipfast.report.radar import radar_figure
from lipfast.report.results import Comparison
from lipfast.report.scores import scores_figure
from lipfast.report.tables import csv_table, markdown_table

RESULTS_FILE = "comparison.json"


def write_report(comparison: Comparison, folder: Path | str) -> list[Path]:
    """Write data, tables, plots and the HTML page of a comparison, and return their paths.

    The folder then holds comparison.json, table.md, table.csv, radar, scores and bars as .png and
    .svg, and report.html; everything but the first can be drawn again from the first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    comparison.save(folder / RESULTS_FILE)
    texts = {
        "table.md": markdown_table(comparison),
        "table.csv": csv_table(comparison),
        "report.html": html_report(comparison),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    plots = [
        *save_figure(radar_figure(comparison), folder / "radar"),
        *save_figure(scores_figure(comparison), folder / "scores"),
        *save_figure(bars_figure(comparison), folder / "bars"),
    ]
    return [folder / RESULTS_FILE, *(folder / name for name in texts), *plots]
