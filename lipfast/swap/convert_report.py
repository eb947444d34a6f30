"""What `convert` did, or would do, to a network, and what else breaks its Lipschitz bound."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lipfast.certify import lipschitz_bound
from lipfast.certify.factors import Factor, is_known, module_factor
from lipfast.certify.findings import findings
from lipfast.certify.graph import evaluation_mode, trace

from .convert_plan import Conversion, Plan, visited
from .report import _shown
from .rules import Unsupported

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {
    "converted": "green",
    "left alone": "yellow",
    "breaks": "red",
    "unknown": "yellow",
    "lipfast": "dim",
    "fine": "dim",
}


@dataclass(frozen=True)
class Step:
    """One layer, or one operation of a forward pass.

    Attributes:
        paths: its names in the network, more than one where it is shared; for an operation the
            module in whose forward pass it stands. "" is the root.
        kind: its class, or the name of the operation.
        status: "converted"; "lipfast" for a layer that needs nothing; "left alone" for one that
            cannot be converted; "breaks" for a factor above 1, or for what acts in training;
            "unknown"; "fine" for a factor of at most 1.
        factor: its Lipschitz constant in evaluation mode, or a bound of it; inf where there is
            none, None where none is known.
        outcome: the new class and the start of its weights, or the reason and what to do.
    """

    paths: tuple[str, ...]
    kind: str
    status: str
    factor: float | None
    outcome: str


@dataclass(frozen=True)
class ConvertReport:
    """What `convert` does to a network, and what it leaves to do; its text is a table.

    Attributes:
        steps: one for each layer, then one for each operation of a forward pass that may break the
            bound.
        bound: a proved Lipschitz constant of the network as it is now, in evaluation mode; None
            where there is none.
        bound_note: for which inputs it holds, or why there is none.
    """

    steps: tuple[Step, ...]
    bound: float | None
    bound_note: str

    @property
    def converted(self) -> tuple[Step, ...]:
        """The layers that are converted."""
        return self._of("converted")

    @property
    def left_alone(self) -> tuple[Step, ...]:
        """The layers that cannot be converted, with the reason."""
        return self._of("left alone")

    @property
    def breaking(self) -> tuple[Step, ...]:
        """All that is not known to be 1-Lipschitz: left alone, breaking or unknown."""
        return self._of("left alone", "breaks", "unknown")

    def _of(self, *statuses: str) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.status in statuses)

    def table(self) -> "Table":
        """Return the table for a rich console."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
        for heading in ("layer", "class or operation", "", "factor", "to, why, or what to do"):
            table.add_column(heading, overflow="fold")
        for step in self.steps:
            factor = "?" if step.factor is None else f"{step.factor:.4g}"
            cells = (_shown(step.paths), step.kind, step.status, factor, step.outcome)
            table.add_row(*map(Text, cells), style=_STYLES[step.status])
        return table

    def summary(self) -> str:
        """Return the numbers of layers and the bound in one line."""
        counts = [f"{len(self._of(s))} {s}" for s in _STYLES if self._of(s)]
        bound = "no bound" if self.bound is None else f"bound {self.bound:.6g} as it is now"
        return f"{', '.join(counts)}; {bound}: {self.bound_note}"

    def __str__(self) -> str:
        from rich.console import Console

        stream = io.StringIO()
        console = Console(file=stream, width=max(120, Console().width), no_color=True)
        console.print(self.table())
        return f"{stream.getvalue()}{self.summary()}"


def steps_of(model: nn.Module, plan: Plan) -> tuple[Step, ...]:
    """Return what is planned for each layer, and what the forward passes do outside of layers."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    layers = [m for m in visited(model) if m in plan or is_known(m)]
    with evaluation_mode(model):  # normalisations of weights iterate in training
        steps = [_step(tuple(paths[m]), m, plan.get(m)) for m in layers]
    return (*steps, *_operations(model))


def report_of(
    model: nn.Module, steps: tuple[Step, ...], example: Tensor | None, *, bounded: bool = True
) -> ConvertReport:
    """Return the report, with the bound of the network as it is now where it is wanted."""
    if not bounded:
        return ConvertReport(steps, None, "ask by example or dry_run")
    if any(tensor.is_meta for tensor in model.parameters()):
        return ConvertReport(steps, None, "its parameters are on the meta device")
    try:
        bound = lipschitz_bound(_original(model), example)
    except (TypeError, ValueError, RuntimeError) as error:
        return ConvertReport(steps, None, str(error))
    where = "" if example is None else f", inputs of shape {tuple(example.shape)}"
    return ConvertReport(steps, bound, f"evaluation mode{where}")


def breaking_text(steps: Sequence[Step]) -> str:
    """Return what breaks the bound in a few words, by class and advice."""
    groups: dict[tuple[str, str], list[str]] = {}
    for step in steps:
        groups.setdefault((step.kind, step.outcome), []).append(_shown(step.paths))
    return "; ".join(
        f"{kind} at {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {outcome}"
        for (kind, outcome), names in groups.items()
    )


def _step(
    paths: tuple[str, ...], module: nn.Module, entry: Conversion | Unsupported | None
) -> Step:
    kind = type(module).__name__
    if isinstance(entry, Conversion):
        start = "its weights" if entry.keep else "fresh weights"
        frozen = [p for p in module.parameters() if not p.requires_grad]
        if frozen and not entry.keep:
            start += ", frozen as before"
        mode = entry.arguments.get("padding_mode")
        if mode and mode != module.padding_mode and max(entry.arguments["kernel_size"]) > 1:
            start += f", {mode} padding"
        has_weights = any(True for _ in module.parameters())
        outcome = entry.layer.__name__ + (f", {start}" if has_weights else "")
        return Step(paths, kind, "converted", 1.0, outcome)
    factor = _factor(module)
    if isinstance(entry, Unsupported):
        return Step(paths, kind, "left alone", factor.value, str(entry))
    if hasattr(module, "lipschitz_bound"):
        status = "lipfast"
    elif factor.value is None:
        status = "unknown"
    else:
        status = "fine" if max(factor.value, factor.training) <= 1 else "breaks"
    return Step(paths, kind, status, factor.value, factor.note)


def _factor(module: nn.Module) -> Factor:
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return Factor(None, "on the meta device")
    try:
        return module_factor(module)
    except ValueError as error:
        return Factor(None, str(error))


def _operations(model: nn.Module) -> list[Step]:
    original = _original(model)
    try:
        with evaluation_mode(original):
            traced = trace(original)
    except TypeError as error:
        return [Step(("",), type(original).__name__, "unknown", None, str(error))]
    return [
        Step(
            (finding.where,),
            finding.what,
            "unknown" if finding.factor is None else "breaks",
            finding.factor,
            finding.note,
        )
        for finding in findings(traced)
    ]


def _original(model: nn.Module) -> nn.Module:
    """The network inside of what `torch.compile` returned."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model
