"""Scores from 1 to 5 on the paper's six axes, beside the published ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lipfast.report import published
from lipfast.report.metrics import six_metrics
from lipfast.report.radar import INNER, axis_range, radial_position
from lipfast.report.results import Comparison
from lipfast.report.style import RC, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORST, BEST = 1.0, 5.0
# places of six_metrics() in the order in which the paper's figure has the axes
PAPER_ORDER = ("certified_36_255", "accuracy", "train_time", "inference_time", "train_memory",
               "inference_memory")  # fmt: skip
_NAMES = ("certified", "accuracy", "train time", "inference\ntime", "train\nmemory",
          "inference\nmemory")  # fmt: skip
NOTE = (
    "Solid: this comparison; 1 is the worst and 5 the best of its methods, times and memory on a "
    "logarithmic scale.\nDashed: the scores of Prach et al., CVPR 2024, of the authors' code on "
    "an A100."
)


def scores(comparison: Comparison) -> dict[str, tuple[float, ...]]:
    """Return six scores by method, in the order of `PAPER_ORDER`, from 1 (worst) to 5 (best).

    A score is the place of the value between those of the worst and the best method: on a
    logarithmic scale that spans at least a factor of 2 for times and memory, on a linear one that
    spans at least 5 points for accuracies. Methods that failed or lack a metric are left out.
    """
    by_key = {metric.key: metric for metric in six_metrics()}
    metrics = [by_key[key] for key in PAPER_ORDER]
    known = tuple(r for r in comparison.finished if all(m.value(r) is not None for m in metrics))
    if not known:
        return {}
    ranges = [axis_range(metric, known) for metric in metrics]
    found = {}
    for result in known:
        values = [m.value(result) for m in metrics]
        shares = [
            (radial_position(m, v, *bounds) - INNER) / (1 - INNER)
            for m, v, bounds in zip(metrics, values, ranges, strict=True)
            if v is not None
        ]
        found[result.method] = tuple(WORST + (BEST - WORST) * share for share in shares)
    return found


def scores_figure(comparison: Comparison) -> Figure:
    """Draw one radar plot per method: the scores found, and the published ones dashed."""
    import matplotlib
    from matplotlib.figure import Figure

    found = scores(comparison)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(13.5, 7.4))
        figure.suptitle(f"Scores on {comparison.dataset}, and those published", fontsize=14)
        if not found:
            figure.text(0.5, 0.5, "No method finished with all six metrics.", ha="center")
            return figure
        look = styles(comparison.finished)
        labels = {r.method: r.label for r in comparison.finished}
        columns = 4
        rows = math.ceil(len(found) / columns)
        for place, (method, values) in enumerate(found.items(), 1):
            axes = figure.add_subplot(rows, columns, place, polar=True)
            _draw(axes, values, published.SCORES.get(method), look[method].color)
            axes.set_title(labels[method], fontweight="bold", pad=22)
        figure.subplots_adjust(left=0.06, right=0.94, top=0.84, bottom=0.14, wspace=0.6, hspace=0.6)
        figure.text(0.5, 0.015, NOTE, fontsize=9, color="#444444", ha="center", va="bottom")
    return figure


def _draw(axes: Any, found: tuple[float, ...], old: tuple[int, ...] | None, color: str) -> None:
    angles = np.linspace(0, 2 * math.pi, len(_NAMES), endpoint=False)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, BEST)
    axes.set_xticks(angles, _NAMES, fontsize=7.5)
    axes.set_yticks(range(1, 6), [])
    axes.tick_params(axis="x", pad=8)
    axes.grid(color="#cccccc", linewidth=0.6)
    closed = np.append(angles, angles[0])
    axes.plot(closed, [*found, found[0]], color=color, linewidth=1.8)
    axes.fill(closed, [*found, found[0]], color=color, alpha=0.18)
    if old is not None:
        axes.plot(closed, [*old, old[0]], color="#555555", linewidth=1.2, linestyle=(0, (4, 2)))
