"""Comparison of methods: measure, keep, and show as tables, plots and one HTML page."""

from lipfast.report.metrics import Metric, all_metrics, six_metrics
from lipfast.report.radii import parse_radius, radius_label
from lipfast.report.results import Comparison, MethodResult
from lipfast.report.tables import csv_table, markdown_table, terminal_table
from lipfast.report.write import write_report

__all__ = [
    "Comparison",
    "MethodResult",
    "Metric",
    "all_metrics",
    "csv_table",
    "markdown_table",
    "parse_radius",
    "radius_label",
    "six_metrics",
    "terminal_table",
    "write_report",
]
