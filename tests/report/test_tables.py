import csv
import io
from collections.abc import Callable

import pytest
from rich.console import Console

from lipfast.report import Comparison, csv_table, markdown_table, terminal_table
from lipfast.report.metrics import bound_text, parameter_count, significant

Make = Callable[..., Comparison]


def rendered(comparison: Comparison) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=80).print(terminal_table(comparison))
    return out.getvalue().splitlines()


def test_terminal_table_fits_and_shows_the_values(make_comparison: Make) -> None:
    lines = rendered(make_comparison())
    assert len(lines) == 2 + 7
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [
        *("method", "params", "train", "infer", "train", "infer", "acc."),
        *["cert.", "%"] * 4,
    ]
    soc = ["SOC", "49.6k", "0.540", "160", "21.5", "3.00", "93.9", "88.0", "76.6", "60.9", "2.8"]
    assert lines[-1].split() == soc


def test_terminal_columns_are_right_aligned(make_comparison: Make) -> None:
    lines = rendered(make_comparison())
    ends = {max(i for i, c in enumerate(line.rstrip())) for line in lines[2:]}
    assert len(ends) == 1


def test_failed_method_keeps_its_row(make_comparison: Make) -> None:
    comparison = make_comparison(failed=("lot",))
    assert [line.split() for line in rendered(comparison) if "LOT" in line] == [["LOT", "failed"]]
    text = markdown_table(comparison)
    assert "- LOT failed: loss: expected a finite value, got nan in epoch 3\n" in text
    row = next(line for line in text.splitlines() if line.startswith("| LOT"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["LOT", "–", "failed"] + 10 * [
        "–"
    ]


def test_markdown_columns_line_up(make_comparison: Make) -> None:
    lines = markdown_table(make_comparison(failed=("lot",))).splitlines()[: 2 + 7]
    bars = [[i for i, c in enumerate(line) if c == "|"] for line in lines]
    assert all(places == bars[0] for places in bars)
    assert "Training time (s/epoch)" in lines[0]
    assert set(lines[1]) == set("|-:")


def test_best_values_are_bold_and_ties_share(make_comparison: Make) -> None:
    text = markdown_table(make_comparison())
    for best in ("0.270", "25.0", "6.50", "2.25", "95.9", "91.6", "82.0", "68.0", "5.0"):
        assert f"**{best}**" in text
    assert text.count("**") == 2 * 9
    tied = markdown_table(make_comparison(("bcop", "lot")))
    assert tied.count("**95.2**") == 2


def test_a_single_method_has_no_best(make_comparison: Make) -> None:
    assert "**" not in markdown_table(make_comparison(("aol", "lot"), failed=("lot",)))


def test_csv_has_every_value_in_full(make_comparison: Make) -> None:
    comparison = make_comparison(failed=("lot",))
    rows = list(csv.DictReader(io.StringIO(csv_table(comparison))))
    assert [row["method"] for row in rows] == [r.method for r in comparison.results]
    for row, result in zip(rows, comparison.results, strict=True):
        if result.failed:
            assert row["error"] == result.error
            assert row["accuracy"] == ""
            continue
        assert float(row["certified_36/255"]) == result.certified[36 / 255]
        assert float(row["layer_bound_max"]) == result.layer_bound_max
        assert int(row["train_memory_bytes"]) == result.train_memory_bytes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.27, "0.270"),
        (1.834, "1.83"),
        (12.34, "12.3"),
        (161.2, "161"),
        (0.0, "0.000"),
        (2.5e-5, "2.50e-05"),
        (3e7, "3.00e+07"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_counts_and_bounds() -> None:
    assert [parameter_count(n) for n in (None, 950, 49578, 1_574_000)] == [
        *("–", "950", "49.6k", "1.57M")
    ]
    assert [bound_text(b) for b in (None, 1.0, 1 + 2e-8, 1 - 4e-5, 1.26)] == [
        *("–", "1", "1 + 2.0e-08", "1 - 4.0e-05", "1.26")
    ]
