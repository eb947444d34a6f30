"""Advice: which figures decide, where they come from, and what is not known."""

import pytest

from lipfast.models import SIZES
from lipfast.report import advise as module
from lipfast.report import published
from lipfast.report.advice_table import advice_lines, advice_table
from lipfast.report.advise import Advice, Budget, advise, parse_bytes

GIB = 2.0**30


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """One figure for each size, so that nothing needs to be counted."""
    sizes = dict(zip(SIZES, (0.5 * GIB, GIB, 4 * GIB, 10 * GIB), strict=True))
    monkeypatch.setattr(module, "_counted_memory", lambda budget, method, size: sizes[size])
    return sizes


def names(candidates) -> list[str]:
    return [candidate.name for candidate in candidates]


def test_without_a_budget_the_best_published_network_wins(memory):
    assert names(advise(Budget()).fitting) == ["SOC M", "SOC L", "CPL L", "CPL M", "LOT S"]


def test_published_tables_agree_with_each_other():
    for method, figures in published.ACCURACY.items():
        seconds = published.EPOCH_SECONDS[method]
        assert [f is None for f in figures] == [s is None for s in seconds]
    assert published.EPOCH_SECONDS["lot"][-1] is None


def test_memory_time_and_inference_each_leave_networks_out(memory):
    advice = advise(Budget(memory_bytes=8 * GIB, train_seconds=7200, inference_seconds=1e-3))
    assert advice.fitting[0].name == "CPL M"
    assert not advice.fitting[0].unknown
    reasons = {c.name: c.objection for c in advice.rejected}
    assert reasons["SOC M"] == "2.28 ms per image"
    assert reasons["SOC L"] == "needs 10.0 GiB"
    assert reasons["LOT S"] == "68 epochs in the time, fewer than 100"


def test_fewer_images_make_shorter_epochs(memory):
    advice = advise(Budget(train_seconds=7200, images=25_000))
    assert "LOT S" in names(advice.fitting)


def test_an_upper_bound_of_the_time_is_enough_to_fit_and_a_lower_one_is_not(memory):
    advice = advise(Budget(inference_seconds=1e-3), alternatives=30)
    found = {c.name: c for c in (*advice.fitting, *advice.rejected)}
    assert found["CPL S"].unknown == ()  # faster than M, which fits
    assert found["CPL L"].unknown == ("inference time",)  # slower than M
    assert found["SOC L"].objection is not None  # slower than M, which does not fit
    assert found["SOC S"].unknown == ("inference time",)
    ranks = [bool(c.unknown) for c in advice.fitting]
    assert ranks == sorted(ranks)


def test_networks_that_surely_fit_are_found_behind_those_that_may(memory):
    advice = advise(Budget(inference_seconds=0.2e-3))
    assert names(advice.fitting)[:2] == ["AOL M", "AOL S"]
    assert [bool(c.unknown) for c in advice.fitting[:2]] == [False, False]


def test_networks_with_too_few_outputs_are_left_out(monkeypatch):
    pairs = [("aol", "XS"), ("aol", "S")]
    monkeypatch.setattr(module, "_by_published_accuracy", lambda: iter(pairs))
    advice = advise(Budget(side=8, batch_size=2, classes=200))
    assert names(advice.fitting) == ["AOL S"]
    assert names(advice.rejected) == ["AOL XS"]
    assert "n_classes" in advice.rejected[0].objection


def test_networks_that_run_out_of_memory_here_are_left_out(memory, monkeypatch):
    def measured(budget, method, size, device):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(module, "_measured_times", measured)
    advice = advise(Budget(), measure=True)
    assert not advice.fitting
    assert {c.objection for c in advice.rejected} == {"does not fit in the memory here"}


def test_times_for_other_images_are_unknown(memory):
    advice = advise(Budget(train_seconds=7200, side=64, classes=200))
    assert advice.fitting[0].unknown == ("training time",)
    assert "ranking, not a forecast" in advice.notes[0]


def test_counted_memory_grows_with_the_batch():
    small, large = (Budget(side=8, batch_size=b) for b in (8, 64))
    a, b = (module._counted_memory(budget, "aol", "XS") for budget in (small, large))
    assert 0 < a < b


def test_measured_times_replace_published_ones(memory):
    budget = Budget(train_seconds=7200, inference_seconds=1.0, side=8, images=64, batch_size=8)
    advice = advise(Budget(**{**vars(budget), "memory_bytes": 0.6 * GIB}), measure=True)
    best = advice.fitting[0]
    assert best.size == "XS"
    assert best.epoch_seconds is not None
    assert best.epoch_seconds.source == "measured"
    assert 0 < best.epoch_seconds.value < 60
    assert best.inference_seconds.source == "measured"


def test_nothing_fits(memory):
    advice = advise(Budget(memory_bytes=1.0))
    assert advice.fitting == ()
    assert list(advice_lines(advice, Budget(memory_bytes=1.0))) == [
        "No method and size is known to fit."
    ]
    assert len(advice.rejected) == 27


def test_lines_and_table_say_where_figures_come_from(memory):
    budget = Budget(memory_bytes=8 * GIB, train_seconds=7200)
    advice = advise(budget)
    text = "\n".join(advice_lines(advice, budget))
    assert "Recommended: SOC M" in text
    assert "66.3 %" in text
    assert "201 epochs (published)" in text
    assert "50 % of the memory (counted)" in text
    table = advice_table(advice)
    assert table.row_count == len(advice.fitting) + len(advice.rejected)
    assert isinstance(advice, Advice)


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GB", 8e9), ("512 MiB", 2**29), ("1e9", 1e9), ("2.5 tb", 2.5e12), ("10B", 10)],
)
def test_bytes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "8XB", "-1GB", "0", "inf", "1..2GB"])
def test_bytes_that_are_none(text):
    with pytest.raises(ValueError, match="memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory_bytes", 0),
        ("train_seconds", -1),
        ("inference_seconds", float("nan")),
        ("side", 12),
        ("classes", 1),
        ("images", 0),
        ("batch_size", 0),
        ("min_epochs", 0),
    ],
)
def test_bad_budgets(name, value):
    with pytest.raises(ValueError, match=name):
        Budget(**{name: value})
