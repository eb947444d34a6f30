"""The commands scaling and advise."""

import pytest
from test_cli import error_line, run

from lipfast.report import advise as module


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
