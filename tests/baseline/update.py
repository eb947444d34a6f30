"""python -m tests.baseline.update [costs] [kernels] [cuda]: record what the tests count now."""

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))  # as pytest does

from baseline.compare import FOLDER, TOOLS, Difference, differences, load, save, shown  # noqa: E402

SELECTION = {
    "costs": [str(TESTS / "baseline" / "test_costs.py")],
    "kernels": [str(TESTS / "kernels"), "-k", "compile"],
    "cuda": [str(TESTS / "csrc"), "-k", "nvcc"],
}


class Recorder:
    """A pytest plugin: the fixture check_baseline hands over its counts, compared with nothing."""

    __name__ = "baseline-recorder"

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, dict[str, int]]] = defaultdict(dict)

    def record(self, topic: str, entries: Mapping[str, Mapping[str, int]]) -> None:
        self.entries[topic].update({name: dict(counts) for name, counts in entries.items()})


def main(topics: list[str], folder: Path = FOLDER) -> int:
    """Run the tests that count, write their counts, and show what changed."""
    unknown = set(topics) - TOOLS.keys()
    if unknown:
        print(f"topics: expected some of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
        return 2
    for topic in topics or TOOLS:
        recorder = Recorder()
        options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        status = pytest.main([*options, *SELECTION[topic]], plugins=[recorder])
        if status != pytest.ExitCode.OK:
            print(f"{topic}.json is unchanged: the tests that count failed")
            return int(status)
        entries = recorder.entries[topic]
        if not entries:
            print(f"{topic}.json is unchanged: no {TOOLS[topic]} on this machine")
            continue
        old = load(topic, folder)["entries"]
        save(topic, entries, folder)
        new, gone = entries.keys() - old.keys(), old.keys() - entries.keys()
        print(f"{topic}.json: {len(entries)} entries, {len(new)} of them new, {len(gone)} gone")
        show(topic, differences(old, {n: c for n, c in entries.items() if n in old}))
    return 0


def show(topic: str, changed: list[Difference]) -> None:
    """Print the differences as a table."""
    if not changed:
        return
    table = Table("entry", "count", title=f"{topic}.json")
    for column in ("old", "new", "change"):
        table.add_column(column, justify="right")
    for d in changed:
        table.add_row(d.entry, d.quantity, shown(d.old), shown(d.new), d.change)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
