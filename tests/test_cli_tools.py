"""The commands search, compare with several sizes, scaling and advise."""

import pytest
from test_cli import error_line, run

from lipfast.report import advise as module
from lipfast.report import budget


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_counted_memory", lambda budget, method, size: 2.0**30)


def test_advise_recommends_and_names_its_sources():
    output, _ = run("advise", "--memory", "8GB", "--train-hours", "2", "--inference-ms", "1")
    assert output.startswith("Recommended: CPL M\n")
    assert "m measured here, c counted, p published" in output
    assert "66.3 p" in output


def test_advise_ends_with_1_where_nothing_fits():
    output, _ = run("advise", "--memory", "1MB", code=1)
    assert output.startswith("No method and size is known to fit.\n")


def test_advise_refuses_bad_budgets():
    assert "memory" in error_line("advise", "--memory", "8XB")
    assert "side" in error_line("advise", "--map", "33")
    assert "train_seconds" in error_line("advise", "--train-hours", "0")


def test_scaling_refuses_unknown_methods(tmp_path):
    assert "method" in error_line("scaling", "--out", tmp_path, "--methods", "eco")
    assert "seconds_per_step" in error_line("scaling", "--out", tmp_path, "--seconds", "0")


@pytest.fixture
def quick_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipfast.report.measure.MINIMUM_SECONDS", 0.0)
    monkeypatch.setattr("lipfast.report.measure.MINIMUM_REPEATS", 1)
    monkeypatch.setattr(budget, "_MINIMUM_SECONDS", 0.0)


@pytest.mark.slow
def test_search_then_compare_two_sizes_in_a_time_budget(tmp_path, quick_training):
    shared = ["--data", "digits", "--methods", "aol", "--sizes", "XS,S"]
    found = tmp_path / "search"
    output, _ = run("search", *shared, "--runs", "1", "--epochs", "1", "--out", found)
    assert "AOL S 1/1: lr " in output
    assert "2 of 2 runs finished" in output
    again, _ = run("search", *shared, "--runs", "1", "--epochs", "1", "--out", found)
    assert "1/1" not in again
    out = tmp_path / "out"
    arguments = ["compare", *shared, "--hours", "1e-6", "--tuned", found, "--out", out]
    output, _ = run(*arguments)
    assert "size XS" in output
    assert (out / "sizes.md").read_text().count("| AOL |") == 1
    for size in ("XS", "S"):
        assert (out / size / "scores.svg").exists()
        assert (out / size / "comparison.json").exists()
    output, _ = run(*arguments, "--resume")
    assert output.count("kept from") == 2


def test_processes_of_a_search_are_numbered(tmp_path, monkeypatch):
    shared = ["search", "--data", "digits", "--methods", "aol", "--epochs", "1", "--out", tmp_path]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    output, _ = run(*shared, "--runs", "1")  # the only run belongs to process 0
    assert output.startswith("0 of 1 runs finished")
    assert "job" in error_line(*shared, "--job", "2/2")
    assert "job" in error_line(*shared, "--job", "first")


def test_several_processes_do_not_compare_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in error_line("compare", "--data", "digits", "--out", tmp_path)


def test_names_count_once(tmp_path):
    shared = ["search", "--data", "digits", "--methods", "aol,aol", "--sizes", "XS,XS"]
    output, _ = run(*shared, "--runs", "1", "--epochs", "1", "--job", "1/2", "--out", tmp_path)
    assert output.startswith("0 of 1 runs finished")


def test_bad_sizes_and_budgets(tmp_path):
    shared = ["--data", "digits", "--out", tmp_path]
    assert "sizes" in error_line("compare", *shared, "--sizes", "XS,XXL")
    assert "sizes" in error_line("search", *shared, "--sizes", "XXL")
    assert "either" in error_line("compare", *shared, "--sizes", "XS", "--size", "S")
    assert "hours" in error_line("compare", *shared, "--hours", "1", "--epochs", "1")
    assert "size" in error_line("compare", *shared, "--tuned", tmp_path)
    assert "finished runs" in error_line("compare", *shared, "--size", "XS", "--tuned", tmp_path)
