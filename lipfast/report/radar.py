"""The radar plot of the six metrics of Prach et al., CVPR 2024."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lipfast.report.metrics import Metric, six_metrics
from lipfast.report.results import Comparison, MethodResult
from lipfast.report.style import RC, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INNER, OUTER = 0.25, 1.0
MINIMUM_RATIO = 2.0
MINIMUM_DIFFERENCE = 5.0
SCALE_NOTE = (
    "Outward is better: the outer ring is the best method. Each axis names the values at its inner "
    "→ outer ring.\nTimes and memory on a logarithmic scale that spans at least a factor of 2, "
    "accuracies on a linear one that spans at least 5 points."
)


def axis_range(metric: Metric, results: tuple[MethodResult, ...]) -> tuple[float, float]:
    """Return the values at the inner (worse) and outer (best) ring of one axis.

    The axis spans the results, but at least a factor of 2 for times and memory and 5 percentage
    points for accuracies, so that a small difference looks small. Raises ValueError when no
    result has a value.
    """
    values = [v for v in map(metric.value, results) if v is not None]
    if not values:
        raise ValueError(f"results: expected at least one with {metric.name}, got none")
    if metric.ratio:
        return max(*values, MINIMUM_RATIO * min(values)), min(values)
    low, high = min(values), max(values)
    return min(low, max(high - MINIMUM_DIFFERENCE, 0.0)), high


def radial_position(metric: Metric, value: float, inner: float, outer: float) -> float:
    """Return the distance from the centre, `INNER` at `inner` and `OUTER` at `outer`."""
    if inner == outer:
        return OUTER
    if metric.ratio:
        share = math.log(value / inner) / math.log(outer / inner)
    else:
        share = (value - inner) / (outer - inner)
    return INNER + (OUTER - INNER) * share


def radar_figure(comparison: Comparison) -> Figure:
    """Draw all methods over each other with labelled axes, and beside it each method alone.

    Failed methods and those that lack one of the six metrics are left out.
    """
    import matplotlib
    from matplotlib.figure import Figure

    metrics = six_metrics()
    drawn = tuple(r for r in comparison.finished if all(m.value(r) is not None for m in metrics))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(13.5, 7.8))
        figure.suptitle(f"Six metrics on {comparison.dataset}", fontsize=14, y=0.975)
        if not drawn:
            figure.text(0.5, 0.5, "No method finished with all six metrics.", ha="center")
            return figure
        ranges = [axis_range(metric, drawn) for metric in metrics]
        curves = {
            r.method: np.array(
                [
                    radial_position(m, v, *bounds)
                    for m, bounds in zip(metrics, ranges, strict=True)
                    if (v := m.value(r)) is not None
                ]
            )
            for r in drawn
        }
        _draw_overlay(figure, metrics, ranges, drawn, curves)
        _draw_panels(figure, drawn, curves)
        figure.text(0.5, 0.025, SCALE_NOTE, fontsize=9, color="#444444", ha="center", va="bottom")
    return figure


def _draw_overlay(
    figure: Figure,
    metrics: tuple[Metric, ...],
    ranges: list[tuple[float, float]],
    drawn: tuple[MethodResult, ...],
    curves: dict[str, NDArray[np.float64]],
) -> None:
    axes = figure.add_axes((0.135, 0.165, 0.37, 0.64), polar=True)
    angles = _prepare(axes, len(metrics))
    look = styles(drawn)
    for result in drawn:
        style = look[result.method]
        axes.plot(
            _closed(angles),
            _closed(curves[result.method]),
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=7,
            linewidth=1.8,
            label=result.label,
            clip_on=False,
        )
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.955),
        ncols=len(drawn),
        frameon=False,
        handlelength=3.5,
        fontsize=10.5,
    )
    for angle, metric, (inner, outer) in zip(angles, metrics, ranges, strict=True):
        # Angles run clockwise from the top.
        side = round(math.sin(angle), 6)
        align = "center" if side == 0 else ("left" if side > 0 else "right")
        at: dict[str, Any] = {
            "xy": (angle, 1.13 if side == 0 else 1.08),
            "textcoords": "offset points",
            "annotation_clip": False,
        }
        axes.annotate(metric.name, xytext=(0, 7), fontweight="bold", ha=align, va="center", **at)
        scale = f"{metric.format(inner)} → {metric.format(outer)} {metric.unit}"
        axes.annotate(scale, xytext=(0, -8), color="#333333", ha=align, va="center", **at)


def _draw_panels(
    figure: Figure,
    drawn: tuple[MethodResult, ...],
    curves: dict[str, NDArray[np.float64]],
) -> None:
    look = styles(drawn)
    columns, rows = 3, max(2, math.ceil(len(drawn) / 3))
    left, top, width, height = 0.65, 0.885, 0.345 / columns, 0.78 / rows
    for i, result in enumerate(drawn):
        row, column = divmod(i, columns)
        box = (left + column * width, top - (row + 1) * height, 0.86 * width, 0.74 * height)
        axes = figure.add_axes(box, polar=True)
        angles = _prepare(axes, len(curves[result.method]))
        for other in drawn:
            axes.plot(_closed(angles), _closed(curves[other.method]), color="#d0d0d0", lw=0.7)
        style = look[result.method]
        curve = _closed(curves[result.method])
        axes.fill(_closed(angles), curve, color=style.color, alpha=0.18)
        axes.plot(
            _closed(angles),
            curve,
            color=style.color,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            linewidth=1.8,
            clip_on=False,
        )
        axes.set_title(result.label, fontsize=11, fontweight="bold", pad=7)


def _prepare(axes: Any, count: int) -> NDArray[np.float64]:
    angles = np.linspace(0, 2 * math.pi, count, endpoint=False)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, OUTER)
    axes.set_xticks(angles, [])
    axes.set_yticks([INNER, (INNER + OUTER) / 2, OUTER], [])
    axes.grid(color="#bbbbbb", linewidth=0.6)
    axes.spines["polar"].set_color("#999999")
    return angles


def _closed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.append(values, values[:1])
