"""The comparison with the committed baseline: what it refuses, says and records."""

import re
import warnings

import pytest
from baseline import compare, update
from compiled_kernels import ROOT

OLD = {"flops": 1000, "launches": 20, "saved_bytes": 0}


@pytest.fixture
def folder(tmp_path):
    compare.save("costs", {"layer": OLD, "other": OLD}, tmp_path)
    return tmp_path


def test_equal_counts_pass(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare.check("costs", {"layer": OLD, "other": dict(OLD)}, folder)


def test_what_is_worse_fails_with_old_new_change_and_command(folder):
    with pytest.raises(AssertionError) as failure:
        compare.check("costs", {"layer": OLD | {"flops": 1100, "launches": 19}}, folder)
    message = str(failure.value)
    assert "layer: flops 1,000 -> 1,100 (+10.0 %)" in message
    assert "layer: launches 20 -> 19 (-5.0 %)" in message
    assert "not what the baseline says" in message
    assert "python -m tests.baseline.update costs" in message


def test_what_is_better_fails_with_praise(folder):
    with pytest.raises(AssertionError, match=r"costs less than .* Record the gain") as failure:
        compare.check("costs", {"layer": OLD | {"launches": 15}}, folder)
    assert "python -m tests.baseline.update costs" in str(failure.value)


def test_entries_and_counts_that_are_new_or_gone_fail(folder):
    with pytest.raises(AssertionError, match=r"third: flops – -> 1,000 \(new\)"):
        compare.check("costs", {"third": OLD}, folder)
    with pytest.raises(AssertionError, match=r"layer: waits – -> 0 \(new\)"):
        compare.check("costs", {"layer": OLD | {"waits": 0}}, folder)
    with pytest.raises(AssertionError, match=r"layer: launches 20 -> – \(gone\)"):
        compare.check("costs", {"layer": {"flops": 1000, "saved_bytes": 0}}, folder)
    with pytest.raises(AssertionError, match=r"saved_bytes 0 -> 8 \(from nothing\)"):
        compare.check("costs", {"layer": OLD | {"saved_bytes": 8}}, folder)
    with pytest.raises(AssertionError, match=r"kernel: registers – -> 32 \(new\)"):
        compare.check("kernels", {"kernel": {"registers": 32}}, folder)


def test_with_another_version_flops_and_saved_bytes_are_compared(folder, monkeypatch):
    monkeypatch.setattr(compare, "tool_version", lambda topic: "torch 9.9.9")
    with pytest.warns(UserWarning, match=r"with torch 2\S+, this is torch 9.9.9: of its counts"):
        compare.check("costs", {"layer": OLD | {"launches": 30}}, folder)
    with (
        pytest.warns(UserWarning, match="recorded with"),
        pytest.raises(AssertionError, match="flops 1,000 -> 999"),
    ):
        compare.check("costs", {"layer": OLD | {"flops": 999, "launches": 30}}, folder)


def test_update_records_and_shows_what_changed(folder, monkeypatch, capsys):
    def run(options, plugins):
        plugins[0].record("costs", {"layer": OLD | {"flops": 1500}})
        plugins[0].record("costs", {"third": OLD})
        return status

    monkeypatch.setattr(update.pytest, "main", run)
    before = (folder / "costs.json").read_text()
    status = pytest.ExitCode.TESTS_FAILED
    assert update.main(["costs"], folder) != 0
    assert (folder / "costs.json").read_text() == before

    status = pytest.ExitCode.OK
    assert update.main(["costs"], folder) == 0
    entries = {"layer": OLD | {"flops": 1500}, "third": OLD}
    assert compare.load("costs", folder)["entries"] == entries
    shown = capsys.readouterr().out
    assert "2 entries, 1 of them new, 1 gone" in shown
    assert re.search(r"layer .* flops .* 1,000 .* 1,500 .* \+50.0 %", shown)
    assert update.main(["nonsense"], folder) == 2


@pytest.mark.parametrize(
    ("topic", "sources", "definition"),
    [
        ("kernels", "kernels/*.py", r"^def (\w+_kernel)\("),
        ("cuda", "csrc/*.cu*", r"__global__[^;{]*?\b(\w+_kernel)\("),
    ],
)
def test_every_kernel_has_a_baseline(topic, sources, definition):
    written = {
        name
        for file in ROOT.glob(sources)
        for name in re.findall(definition, file.read_text(), re.MULTILINE)
    }
    entries = compare.load(topic)["entries"]
    assert {re.split(r"[ <]", entry)[0] for entry in entries} == written
