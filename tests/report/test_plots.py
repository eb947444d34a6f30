import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lipfast.report import Comparison, six_metrics, write_report
from lipfast.report.bars import bars_figure
from lipfast.report.figures import save_figure, svg_text
from lipfast.report.radar import INNER, OUTER, axis_range, radar_figure, radial_position
from lipfast.report.style import STYLES, styles

Make = Callable[..., Comparison]
CASES = [
    ((), ()),
    (("aol",), ()),
    (("aol", "soc"), ()),
    (("aol", "bcop", "cayley", "cpl", "lot", "sll", "soc"), ()),
    (("aol", "bcop", "cayley", "cpl", "lot", "sll", "soc"), ("lot", "aol")),
    (("lot",), ("lot",)),
]


@pytest.mark.parametrize(("methods", "failed"), CASES)
@pytest.mark.parametrize("draw", [radar_figure, bars_figure])
def test_texts_are_inside_the_figure_and_apart(
    draw: Callable[[Comparison], Figure],
    methods: tuple[str, ...],
    failed: tuple[str, ...],
    make_comparison: Make,
) -> None:
    figure = draw(make_comparison(methods, failed))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    hidden = undrawn(figure)
    texts = [
        text
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and text not in hidden
    ]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    width, height = figure.get_size_inches() * figure.dpi
    for label, box in boxes:
        assert box.x0 >= 0, label
        assert box.y0 >= 0, label
        assert box.x1 <= width, label
        assert box.y1 <= height, label
    for (label, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (label, other)


def undrawn(figure: Figure) -> set[Text]:
    """Texts of hidden panels and of ticks beyond the end of an axis."""
    texts: set[Text] = set()
    for axes in figure.axes:
        if not axes.get_visible():
            texts |= set(axes.findobj(Text))
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [t for t in axis.get_major_ticks() if not low <= t.get_loc() <= high]
            texts |= {label for tick in ticks for label in (tick.label1, tick.label2)}
    return texts


@pytest.mark.parametrize("draw", [radar_figure, bars_figure])
def test_files_have_labels_and_a_sane_size(
    draw: Callable[[Comparison], Figure], make_comparison: Make, tmp_path: Path
) -> None:
    comparison = make_comparison()
    png, svg = save_figure(draw(comparison), tmp_path / "plot")
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert 1500 <= image.width <= 3000
        assert 900 <= image.height <= 3000
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    text = svg.read_text()
    for label in [r.label for r in comparison.results] + [m.name for m in six_metrics()]:
        assert f">{label}<" in text
    assert svg_text(draw(comparison)) == text


def test_radar_names_the_values_of_both_rings(make_comparison: Make) -> None:
    text = svg_text(radar_figure(make_comparison()))
    for scale in ("1.83 → 0.270 s/epoch", "160 → 25.0 µs/image", "58.0 → 6.50 MiB"):
        assert scale in text


def test_radar_positions_put_the_best_outside(make_comparison: Make) -> None:
    results = make_comparison().finished
    for metric in six_metrics():
        inner, outer = axis_range(metric, results)
        values = [v for v in map(metric.value, results) if v is not None]
        positions = [radial_position(metric, v, inner, outer) for v in values]
        assert max(positions) == pytest.approx(OUTER)
        assert min(positions) >= INNER - 1e-12
        best = min(values) if metric.lower_is_better else max(values)
        assert values[positions.index(max(positions))] == best


def test_radar_makes_small_differences_small(make_comparison: Make) -> None:
    time, *_, accuracy, _ = six_metrics()
    results = make_comparison(("aol", "cpl")).finished
    assert axis_range(time, results) == (pytest.approx(0.54), 0.27)
    inner, outer = axis_range(accuracy, results)
    assert (inner, outer) == (pytest.approx(88.1), pytest.approx(93.1))
    middle = radial_position(time, math.sqrt(0.54 * 0.27), 0.54, 0.27)
    assert middle == pytest.approx((INNER + OUTER) / 2)


def test_styles_can_be_told_apart(make_comparison: Make) -> None:
    look = styles(make_comparison().results)
    assert len(look) == 7
    for attribute in ("color", "marker", "line", "hatch"):
        assert len({str(getattr(style, attribute)) for style in look.values()}) == 7
    assert look["soc"] == styles(make_comparison(("soc",)).results)["soc"]


def test_method_styles_cover_all_methods() -> None:
    from lipfast.nn import METHODS

    assert list(STYLES) == list(METHODS)


def test_report_writes_all_files_and_draws_them_again(
    make_comparison: Make, tmp_path: Path
) -> None:
    paths = write_report(make_comparison(failed=("lot",)), tmp_path / "a")
    assert sorted(p.name for p in paths) == [
        *("bars.png", "bars.svg", "comparison.json", "radar.png", "radar.svg"),
        *("report.html", "scores.png", "scores.svg", "table.csv", "table.md"),
    ]
    again = write_report(Comparison.load(tmp_path / "a" / "comparison.json"), tmp_path / "b")
    for first, second in zip(paths, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
