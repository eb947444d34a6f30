"""The growth of time and memory as plots, as a table, and as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipfast.nn import METHODS
from lipfast.report.figures import save_figure
from lipfast.report.metrics import MIB, significant
from lipfast.report.scaling import FIXED, PLAIN, Point, Scaling, fitted_exponent
from lipfast.report.style import RC, STYLES, Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLAIN_STYLE = Style("#888888", ".", "solid", "")
_VALUES = {
    "seconds": ("training step (ms)", 1e3),
    "saved_bytes": ("saved for backward (MiB)", 1 / MIB),
}
_AXES = {"channels": "channels", "side": "height and width of the maps"}
NOTE = (
    "Filled markers and solid lines are measured; hollow markers and dotted lines are computed: "
    "the last measured time\ntimes the ratio of the multiply-adds. Memory is counted. Exponents "
    "are fitted to the larger half of the measured sizes."
)


def label(method: str) -> str:
    """The name of a method for people."""
    return "nn.Conv2d" if method == PLAIN else METHODS[method].label


def scaling_figure(scaling: Scaling) -> Figure:
    """Draw time and memory over channels and over maps, log-log, one line per method."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(RC):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, rect=(0, 0.05, 1, 0.95))
        figure = Figure(figsize=(13.5, 10), layout=layout)
        figure.suptitle("Growth of a 3x3 layer's training step", fontsize=14)
        panels = figure.subplots(2, 2)
        for row, axis in zip(panels, _AXES, strict=True):
            for axes, value in zip(row, _VALUES, strict=True):
                _draw(axes, scaling, axis, value)
        figure.text(0.5, 0.01, NOTE, fontsize=9, color="#444444", ha="center", va="bottom")
    return figure


def scaling_table(scaling: Scaling) -> str:
    """Return Markdown: the conditions, the exponents, and every point, computed ones marked."""
    lines = [
        f"Measured on {scaling.machine}; "
        + ", ".join(f"{name} {version}" for name, version in scaling.versions.items())
        + ".",
        "",
        "| method | time, channels | time, side | memory, channels | memory, side |",
        "|---|---|---|---|---|",
    ]
    for method in scaling.methods:
        exponents = [
            fitted_exponent(scaling.curve(method, axis), axis, value)
            for value in _VALUES
            for axis in _AXES
        ]
        cells = ["–" if e is None else f"{e:.2f}" for e in exponents]
        lines.append("| " + " | ".join([label(method), *cells]) + " |")
    lines += ["", "Fitted exponents, to the larger half of the measured (memory: all) sizes."]
    for axis in _AXES:
        lines += ["", *_point_table(scaling, axis)]
    return "\n".join(lines) + "\n"


def write_scaling(scaling: Scaling, folder: Path | str) -> list[Path]:
    """Write scaling.json, .csv, .md, .png and .svg into a folder and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    conditions = {
        "device": scaling.device,
        "machine": scaling.machine,
        "versions": scaling.versions,
        "points": [vars(point) for point in scaling.points],
    }
    texts = {
        "scaling.json": json.dumps(conditions, indent=1) + "\n",
        "scaling.csv": scaling.csv(),
        "scaling.md": scaling_table(scaling),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [
        *(folder / name for name in texts),
        *save_figure(scaling_figure(scaling), folder / "scaling"),
    ]


def _point_table(scaling: Scaling, axis: str) -> list[str]:
    name, fixed = FIXED[axis]
    sizes = sorted({getattr(p, axis) for p in scaling.points if p.axis == axis})
    lines = [
        f"Milliseconds of a training step, {name} {fixed}, batch {scaling.points[0].batch} "
        "(in brackets: computed, not measured):",
        "",
        f"| {axis} | " + " | ".join(map(str, sizes)) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for method in scaling.methods:
        cells = [_time_cell(point) for point in scaling.curve(method, axis)]
        lines.append("| " + " | ".join([label(method), *cells]) + " |")
    return lines


def _time_cell(point: Point) -> str:
    text = significant(1e3 * point.seconds)
    return text if point.measured else f"({text})"


def _draw(axes: Any, scaling: Scaling, axis: str, value: str) -> None:
    title, factor = _VALUES[value]
    for method in scaling.methods:
        style = STYLES.get(method, _PLAIN_STYLE)
        curve = scaling.curve(method, axis)
        sure = [p for p in curve if p.measured or value != "seconds"]
        rest = curve[len(sure) - 1 :] if len(sure) < len(curve) else ()
        exponent = fitted_exponent(curve, axis, value)
        name = label(method) + ("" if exponent is None else f"  {exponent:.2f}")
        for points, line, fill, shown in (
            (sure, "solid", style.color, name),
            (rest, "dotted", "white", None),
        ):
            axes.plot(
                [getattr(p, axis) for p in points],
                [factor * getattr(p, value) for p in points],
                color=style.color, linestyle=line, marker=style.marker, markersize=6,
                markerfacecolor=fill, linewidth=1.5, label=shown, zorder=2 if shown else 1,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(_AXES[axis])
    name, fixed = FIXED[axis]
    axes.set_title(f"{title}, {name} {fixed}", fontsize=11, fontweight="bold", loc="left")
    ticks = sorted({getattr(p, axis) for p in scaling.points if p.axis == axis})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(title="exponent", frameon=False, fontsize=9, loc="upper left")
