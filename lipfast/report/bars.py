"""Bar charts of the six metrics and of the certified robust accuracy at every radius."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lipfast.report.metrics import Metric, all_metrics
from lipfast.report.results import Comparison, MethodResult
from lipfast.report.style import RC, Style, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3


def bars_figure(comparison: Comparison) -> Figure:
    """Draw one panel per metric with one bar per method, the value at its end.

    Failed methods are left out; a missing value has no bar.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    metrics = all_metrics(comparison)
    finished = comparison.finished
    rows = math.ceil(len(metrics) / COLUMNS)
    with matplotlib.rc_context(RC):
        height = rows * (1.0 + 0.34 * max(len(finished), 2)) + 0.6
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.04)
        figure = Figure(figsize=(13.5, height), layout=layout)
        figure.suptitle(f"All metrics on {comparison.dataset}", fontsize=14)
        panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
        look = styles(finished)
        for axes, metric in zip(panels, metrics, strict=False):
            _draw_panel(axes, metric, finished, look)
        for axes in panels[len(metrics) :]:
            axes.set_visible(False)
        # The layout is found once, so that every file of the figure has the same.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def _draw_panel(
    axes: Any, metric: Metric, results: tuple[MethodResult, ...], look: dict[str, Style]
) -> None:
    values = [metric.value(result) for result in results]
    for place, (result, value) in enumerate(zip(results, values, strict=True)):
        style = look[result.method]
        axes.barh(
            place,
            value or 0.0,
            height=0.72,
            color=style.color,
            hatch=style.hatch,
            edgecolor="white" if style.color == "#000000" else "#222222",
            linewidth=0.6,
        )
        axes.annotate(
            metric.text(result),
            (value or 0.0, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(results)), [result.label for result in results])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    present = [v for v in values if v is not None]
    # Room at the right for the value beside the longest bar.
    axes.set_xlim(0, 1.18 * max(present, default=1.0) or 1.0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    direction = "lower is better" if metric.lower_is_better else "higher is better"
    axes.set_title(metric.name, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlabel(f"{metric.unit} ({direction})", fontsize=9, color="#444444")
