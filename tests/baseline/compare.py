"""Compares what a test has counted with the committed baseline; docs/baseline.md says why."""

import functools
import importlib
import json
import re
import subprocess
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compiled_kernels import NVCC

FOLDER = Path(__file__).parent
TOOLS = {"costs": "torch", "kernels": "triton", "cuda": "nvcc"}  # topic -> what decides its counts
OF_ANY_VERSION = {"flops", "saved_bytes"}

Counts = Mapping[str, int]


class Difference(NamedTuple):
    """One count that is not what it was; None where it was not counted."""

    entry: str
    quantity: str
    old: int | None
    new: int | None

    @property
    def change(self) -> str:
        if self.old is None or self.new is None:
            return "new" if self.old is None else "gone"
        return f"{100 * (self.new / self.old - 1):+.1f} %" if self.old else "from nothing"

    @property
    def lower(self) -> bool:
        return self.old is not None and self.new is not None and self.new < self.old


def check(topic: str, entries: Mapping[str, Counts], folder: Path = FOLDER) -> None:
    """Compare counted entries with those of <topic>.json, and warn of what cannot be compared.

    Raises:
        AssertionError: a count differs, be it for the better; with the command that records it.
    """
    baseline = load(topic, folder)
    old = {name: baseline["entries"].get(name, {}) for name in entries}
    if baseline["version"] is not None and baseline["version"] != tool_version(topic):
        warnings.warn(
            f"{topic}.json was recorded with {baseline['version']}, this is "
            f"{tool_version(topic)}: of its counts only FLOPs and saved bytes are compared",
            stacklevel=2,
        )
        old, entries = of_any_version(old), of_any_version(entries)
    changed = differences(old, entries)
    assert not changed, explain(topic, changed)


def of_any_version(entries: Mapping[str, Counts]) -> dict[str, Counts]:
    """Return the counts that do not depend on the version of the tool."""
    return {
        name: {quantity: n for quantity, n in counts.items() if quantity in OF_ANY_VERSION}
        for name, counts in entries.items()
    }


def differences(old: Mapping[str, Counts], new: Mapping[str, Counts]) -> list[Difference]:
    """Return what differs between two sets of entries, sorted by entry and quantity."""
    return [
        Difference(entry, quantity, before.get(quantity), after.get(quantity))
        for entry in sorted(old.keys() | new.keys())
        for before, after in [(old.get(entry, {}), new.get(entry, {}))]
        for quantity in sorted(before.keys() | after.keys())
        if before.get(quantity) != after.get(quantity)
    ]


def explain(topic: str, changed: list[Difference]) -> str:
    """Say what changed, and how to record it."""
    if all(difference.lower for difference in changed):
        head = "This costs less than the baseline says. Record the gain, so that it is kept"
    else:
        head = "This is not what the baseline says. If it is meant, record it"
    lines = [
        f"  {d.entry}: {d.quantity} {shown(d.old)} -> {shown(d.new)} ({d.change})" for d in changed
    ]
    return "\n".join([f"{head}: python -m tests.baseline.update {topic}", *lines])


def shown(count: int | None) -> str:
    """Write a count for people; a dash where there is none."""
    return "–" if count is None else f"{count:,}"


def load(topic: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Return {"version": of the tool that decides the counts, "entries": entry -> counts}."""
    file = folder / f"{topic}.json"
    return json.loads(file.read_text()) if file.exists() else {"version": None, "entries": {}}


def save(topic: str, entries: Mapping[str, Counts], folder: Path = FOLDER) -> None:
    """Write <topic>.json, one line for each entry."""
    lines = [
        f"    {json.dumps(entry)}: {json.dumps(counts, sort_keys=True)}"
        for entry, counts in sorted(entries.items())
    ]
    version = json.dumps(tool_version(topic))
    text = ",\n".join(lines)
    (folder / f"{topic}.json").write_text(
        f'{{\n  "version": {version},\n  "entries": {{\n{text}\n  }}\n}}\n'
    )


@functools.cache
def tool_version(topic: str) -> str:
    """Return the tool that decides the counts of a topic, and its release."""
    tool = TOOLS[topic]
    if tool == "nvcc":
        command = [str(NVCC), "--version"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        release = re.findall(r"\bV([\d.]+)", report)[0]
    else:
        release = importlib.import_module(tool).__version__.split("+")[0]
    return f"{tool} {release}"
