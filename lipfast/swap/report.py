"""What `accelerate` did, or would do, to each module of a network."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 160  # columns, of which the table takes what it needs
_STYLES = {"replaced": "green", "left alone": "yellow", "lipfast": "dim", "unknown": "dim"}


@dataclass(frozen=True)
class Entry:
    """One module: where it is, what it was, and what became of it.

    Attributes:
        paths: its names in the network, more than one where it is shared; "" is the root.
        kind: its class before.
        status: "replaced"; "left alone" for a layer that looks known but is not supported;
            "lipfast" for one that needs nothing; "unknown".
        outcome: the lipfast class and its source, the reason for leaving the layer alone, or "".
    """

    paths: tuple[str, ...]
    kind: str
    status: str
    outcome: str


@dataclass(frozen=True)
class SwapReport:
    """What `accelerate` does to a network; its text is a table.

    Attributes:
        entries: one for each layer: module without children, or with parameters of its own.
        exact: whether outputs stay the same, or sound bounds take the place of published ones.
    """

    entries: tuple[Entry, ...]
    exact: bool

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """The layers that are replaced."""
        return self._of("replaced")

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        """The layers that look known and are not supported, with the reason."""
        return self._of("left alone")

    @property
    def unknown(self) -> tuple[Entry, ...]:
        """The layers of unknown classes."""
        return self._of("unknown")

    def _of(self, status: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.status == status)

    def table(self) -> "Table":
        """Return the table for a rich console: layers one by one, unknown ones by class."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
        for heading in ("layer", "class", "", "by, or why not"):
            table.add_column(heading, overflow="fold")
        for entry in self.entries:
            if entry.status != "unknown":
                cells = (_shown(entry.paths), entry.kind, entry.status, entry.outcome)
                table.add_row(*map(Text, cells), style=_STYLES[entry.status])
        kinds = [entry.kind for entry in self.unknown]
        for kind in dict.fromkeys(kinds):
            names = [name for e in self.unknown if e.kind == kind for name in e.paths]
            count = kinds.count(kind)
            first = _shown(tuple(names[:1])) + (f" and {len(names) - 1} more" if names[1:] else "")
            table.add_row(*map(Text, (first, kind, "unknown", f"{count} left as they are")))
        return table

    def summary(self) -> str:
        """Return the numbers of layers in one line."""
        counts = [f"{len(self._of(status))} {status}" for status in _STYLES]
        return ", ".join(counts) + ("; outputs as before" if self.exact else "; best sound layers")

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        Console(file=stream, width=_WIDTH, no_color=True).print(self.table())
        lines = [line.rstrip() for line in stream.getvalue().splitlines()]
        return "\n".join([*lines, self.summary()])


def _shown(paths: tuple[str, ...]) -> str:
    return ", ".join(path or "(the network)" for path in paths)
