"""Tables and plots of benchmark results, and which rows lose."""

import json

import pytest

from lipfast.report.bench import BenchReport, ratio_lines, ratios_figure, write_bench


def entry(name: str, medians: dict, **extra) -> dict:
    first, *others = medians
    ratio = {other: medians[other] / medians[first] for other in others}
    info = {"median_ms": medians, "ratio": ratio, **extra}
    return {"name": name, "extra_info": info, "stats": {"median": medians[first] / 1e3}}


@pytest.fixture
def results(tmp_path):
    machine = {
        "cpu": {"brand_raw": "A processor"},
        "lipfast": {
            "commit": "abc", "python": "3.11", "threads": 2, "gpu": None, "driver": None,
            "info": {"torch": "2.13", "triton": "3.7", "extension": {"nvcc": "13.0"}},
        },
    }  # fmt: skip
    saved = {"lipfast": 2**20, "reference": 3 * 2**20}
    document = {
        "machine_info": machine,
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [
            entry("bench_a[XS-aol]", {"lipfast": 2.0, "reference": 5.0}, saved_bytes=saved),
            entry("bench_a[XS-soc]", {"lipfast": 4.0, "reference": 2.0, "plain": 1.0}),
            entry("bench_b", {"cpp": 1.0, "plain conv2d": 0.5, "Conv2d": 0.5}, target=3.5),
        ],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    return path


def test_tables_show_ratios_and_counts(results):
    text = BenchReport.load(results).markdown()
    assert text.startswith("# A processor, 2 CPU threads\n\nCommit abc, 2026-01-02; Python 3.11")
    assert "nvcc 13.0" in text
    assert "driver" not in text
    assert "| XS-aol | lipfast | 2.00 | 2.50 |  | 1.00 MiB (reference 3.00x) |" in text
    assert "| XS-soc | lipfast | 4.00 | 0.50 | 0.25 |  |" in text
    assert "## bench_b" in text


def test_rows_that_lose_are_named_and_plain_convolutions_do_not_count(results):
    assert [row.name for row in BenchReport.load(results).slower] == ["bench_a[XS-soc]"]


def test_lines_for_the_terminal(results):
    benches = json.loads(results.read_text())["benchmarks"]
    lines = ratio_lines((b["name"], b["extra_info"]) for b in benches)
    assert lines == [
        "  bench_a[XS-aol]: lipfast 2.00 ms; reference 2.50x",
        "! bench_a[XS-soc]: lipfast 4.00 ms; reference 0.50x, plain 0.25x",
        "  bench_b: cpp 1.00 ms; plain conv2d 0.50x, Conv2d 0.50x",
    ]


def test_plot_has_a_panel_for_each_benchmark(results, tmp_path):
    report = BenchReport.load(results)
    panels = [axes for axes in ratios_figure(report).axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["bench_a", "bench_b"]
    paths = write_bench(report, tmp_path / "out")
    assert [p.name for p in paths] == ["README.md", "ratios.png", "ratios.svg"]
    assert all(p.stat().st_size for p in paths)


@pytest.mark.parametrize("text", ["", "[]", '{"benchmarks": []}', '{"machine_info": 1}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: expected the JSON"):
        BenchReport.load(path)
