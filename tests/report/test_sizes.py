"""The table of all sizes, and the scores beside the published ones."""

from dataclasses import replace

import pytest

from lipfast.report import published
from lipfast.report.results import Comparison, MethodResult
from lipfast.report.scores import PAPER_ORDER, scores, scores_figure
from lipfast.report.sizes import sizes_csv, sizes_table, write_sizes

RADIUS = 36 / 255


def result(method: str, accuracy: float, seconds: float, **changes) -> MethodResult:
    figures = {
        "train_seconds_per_epoch": seconds,
        "inference_images_per_second": 1e3 / seconds,
        "train_memory_bytes": int(1e6 * seconds),
        "inference_memory_bytes": int(1e5 * seconds),
        "certified": {RADIUS: accuracy - 0.1},
    }
    return MethodResult(method, method.upper(), accuracy=accuracy, **{**figures, **changes})


def comparison(*results: MethodResult, dataset: str = "cifar10") -> Comparison:
    return Comparison(tuple(results), dataset, "cpu", "a machine", {}, "2026-01-01", {})


def test_rows_are_methods_and_columns_are_sizes():
    small = comparison(result("aol", 0.7, 1), result("lot", 0.75, 8))
    large = comparison(MethodResult("lot", "LOT", error="out of memory"))
    lines = sizes_table({"L": large, "XS": small}).splitlines()
    assert lines[2] == "| method | XS | L |"
    assert lines[4] == "| AOL | 70.0 / 60.0 |  |"
    assert lines[5] == "| | *71.7 / 59.1* | *73.7 / 61.5* |"
    assert lines[6] == "| LOT | 75.0 / 65.0 | failed |"
    assert lines[7] == "| | *75.5 / 63.4* | *out of memory* |"


def test_other_data_sets_have_no_published_rows(tmp_path):
    found = {"XS": comparison(result("soc", 0.9, 1), dataset="digits")}
    assert "*" not in sizes_table(found)
    paths = write_sizes(found, tmp_path)
    assert [p.name for p in paths] == ["sizes.md", "sizes.csv"]
    rows = sizes_csv(found).splitlines()
    assert rows[1] == "soc,XS,,0.9,0.8,"


def test_scores_run_from_1_to_5_and_better_is_higher():
    found = scores(comparison(result("aol", 0.6, 1), result("cpl", 0.8, 2), result("lot", 0.7, 4)))
    best_certified, train_time = 0, PAPER_ORDER.index("train_time")
    assert found["cpl"][best_certified] == 5
    assert found["aol"][best_certified] == 1
    assert found["lot"][best_certified] == pytest.approx(3)
    assert [found[m][train_time] for m in ("aol", "cpl", "lot")] == pytest.approx([5, 3, 1])


def test_a_small_difference_is_a_small_difference():
    found = scores(comparison(result("aol", 0.800, 1), result("cpl", 0.801, 1.01)))
    assert found["cpl"][1] - found["aol"][1] == pytest.approx(4 * 0.1 / 5, abs=0.01)
    assert found["aol"][2] - found["cpl"][2] < 0.1


def test_methods_without_all_metrics_have_no_score():
    poor = replace(result("aol", 0.6, 1), train_memory_bytes=None)
    assert scores(comparison(poor)) == {}
    assert "No method" in scores_figure(comparison(poor)).texts[-1].get_text()


def test_figure_has_a_panel_per_method_with_the_published_scores():
    figure = scores_figure(comparison(result("aol", 0.6, 1), result("cpl", 0.8, 2)))
    assert [axes.get_title() for axes in figure.axes] == ["AOL", "CPL"]
    solid, dashed = figure.axes[1].get_lines()
    assert list(dashed.get_ydata()[:-1]) == list(published.SCORES["cpl"])
    assert len(solid.get_ydata()) == 7
