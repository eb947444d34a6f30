"""Benchmark results that pytest-benchmark wrote, as tables and plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipfast.report.figures import save_figure
from lipfast.report.metrics import MIB, significant
from lipfast.report.style import RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LIMITS = (0.2, 50.0)  # of the plots' axis of ratios
_COLUMNS = 3
_FOR_SCALE = ("plain", "conv2d", "copies")  # in the names of variants that do not compete


@dataclass(frozen=True)
class Row:
    """One benchmark: the medians in milliseconds of its variants, the first of them ours.

    `ratio` says how many times as long the others take as the first; `extra` holds what was
    counted, each by variant.
    """

    name: str
    medians: Mapping[str, float]
    ratio: Mapping[str, float]
    extra: Mapping[str, Any]

    @property
    def group(self) -> str:
        """The benchmark without its parameters."""
        return self.name.partition("[")[0]

    @property
    def case(self) -> str:
        """The parameters."""
        return self.name.partition("[")[2].rstrip("]")


@dataclass(frozen=True)
class BenchReport:
    """The rows of a run, and what it was measured on."""

    rows: tuple[Row, ...]
    machine: str
    versions: Mapping[str, str]
    commit: str | None
    date: str

    @classmethod
    def load(cls, path: Path | str) -> BenchReport:
        """Read the JSON file that `pytest bench --benchmark-only --benchmark-json` wrote.

        Raises FileNotFoundError where there is none, ValueError where it holds something else.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            info = document["machine_info"]
            ours = info["lipfast"]
            cpu = info.get("cpu", {}).get("brand_raw", info.get("processor", "CPU"))
            versions = {"Python": ours["python"], "torch": ours["info"]["torch"]}
            versions |= {"triton": ours["info"]["triton"], "driver": ours["driver"]}
            versions["nvcc"] = ours["info"]["extension"].get("nvcc")
            return cls(
                tuple(_row(bench) for bench in document["benchmarks"]),
                f"{ours['gpu'] or cpu}, {ours['threads']} CPU threads",
                {name: str(version) for name, version in versions.items() if version},
                ours["commit"],
                document["datetime"][:10],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: expected the JSON of lipfast's benchmarks by pytest-benchmark, "
                f"got {type(error).__name__}: {error}"
            ) from error

    @property
    def slower(self) -> tuple[Row, ...]:
        """Rows in which another variant than a plain convolution is faster than the first."""
        return tuple(row for row in self.rows if any(r < 1 for r in rivals(row).values()))

    def markdown(self) -> str:
        """Return what was measured on, and one table for each benchmark."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"# {self.machine}",
            "",
            f"Commit {self.commit}, {self.date}; {versions}. Medians of interleaved runs; the "
            "other columns say how many times as long each variant takes as the first.",
        ]
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = [row for row in self.rows if row.group == group]
            lines += ["", f"## {group}", "", *_table(rows)]
        return "\n".join(lines) + "\n"


def rivals(row: Row) -> dict[str, float]:
    """The ratios of a row without those that are there for scale: plain convolutions and copies."""
    return {
        name: ratio
        for name, ratio in row.ratio.items()
        if not any(scale in name.lower() for scale in _FOR_SCALE)
    }


def ratio_lines(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return one line for each benchmark, from its name and pytest-benchmark's extra_info.

    A line starts with "!" where another variant than a plain convolution is faster than the first.
    """
    lines = []
    for name, extra in rows:
        row = _row({"name": name, "extra_info": extra})
        first, milliseconds = next(iter(row.medians.items()))
        others = ", ".join(f"{variant} {ratio:.2f}x" for variant, ratio in row.ratio.items())
        mark = "!" if any(ratio < 1 for ratio in rivals(row).values()) else " "
        lines.append(f"{mark} {name}: {first} {significant(milliseconds)} ms; {others}")
    return lines


def ratios_figure(report: BenchReport) -> Figure:
    """Draw the ratios of every benchmark, one panel each, on a logarithmic axis."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    groups: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.ratio:
            groups.setdefault(row.group, []).append(row)
    with matplotlib.rc_context(RC):
        rows = max(1, -(-len(groups) // _COLUMNS))
        longest = max((len(g) for g in groups.values()), default=1)
        size = (15, rows * (1.6 + 0.22 * longest))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(hspace=0.05))
        figure.suptitle(f"How many times as long: {report.machine}", fontsize=13)
        panels = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
        for axes, (group, entries) in zip(panels, groups.items(), strict=False):
            _draw(axes, group, entries)
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
    return figure


def write_bench(report: BenchReport, folder: Path | str) -> list[Path]:
    """Write README.md, ratios.png and ratios.svg into a folder and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(report.markdown(), encoding="utf-8")
    return [folder / "README.md", *save_figure(ratios_figure(report), folder / "ratios")]


def _row(bench: Mapping[str, Any]) -> Row:
    extra = dict(bench["extra_info"])
    medians, ratio = extra.pop("median_ms", {}), extra.pop("ratio", {})
    if not medians:
        medians = {"first": 1e3 * bench["stats"]["median"]}
    counted = {key: value for key, value in extra.items() if isinstance(value, Mapping)}
    return Row(bench["name"], medians, ratio, counted)


def _table(rows: Sequence[Row]) -> list[str]:
    others = list(dict.fromkeys(name for row in rows for name in row.ratio))
    counted = list(dict.fromkeys(name for row in rows for name in row.extra))
    head = ["case", "first", "ms", *others, *(f"{name}, first (others)" for name in counted)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        first, milliseconds = next(iter(row.medians.items()))
        cells = [row.case or "–", first, significant(milliseconds)]
        cells += [f"{row.ratio[name]:.2f}" if name in row.ratio else "" for name in others]
        cells += [_counted(name, row.extra.get(name)) for name in counted]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _counted(quantity: str, values: Mapping[str, Any] | None) -> str:
    """The value of the first variant, and how many times as much the others take."""
    if not values:
        return ""
    (_, first), *others = values.items()
    if not isinstance(first, int | float):
        return ""
    if "bytes" in quantity:
        text = f"{significant(first / MIB)} MiB"
    else:
        text = significant(first)
    known = [(n, v) for n, v in others if isinstance(v, int | float)]
    if not first or not known:
        return text
    return f"{text} (" + ", ".join(f"{n} {v / first:.2f}x" for n, v in known) + ")"


def _draw(axes: Any, group: str, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row.ratio))
    colors = dict(zip(names, _palette(), strict=False))
    for place, row in enumerate(rows):
        for name, ratio in row.ratio.items():
            at = min(max(ratio, _LIMITS[0]), _LIMITS[1])
            axes.plot(at, place, "o", color=colors.get(name, "#000000"), markersize=6)
    for name in names:
        axes.plot([], [], "o", color=colors.get(name, "#000000"), label=name)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(*_LIMITS)
    ticks = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row.case or group for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_title(group, fontsize=10, fontweight="bold", loc="left")
    axes.legend(fontsize=7, frameon=False, loc="best")


def _palette() -> list[str]:
    from lipfast.report.style import STYLES

    return [style.color for style in STYLES.values()]
