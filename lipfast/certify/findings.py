"""What the forward passes of a network do to a Lipschitz bound, outside of its layers."""

import math
from typing import NamedTuple

from torch import fx

from . import operations
from .factors import module_factor


class Finding(NamedTuple):
    """An operation that may break a bound of 1.

    Args:
        where: name of the module in whose forward pass it stands, "" for the network's own.
        what: the operation.
        factor: for signals that are themselves bounded by 1; None where it is not known.
        note: what to do about it.
    """

    where: str
    what: str
    factor: float | None
    note: str


def findings(traced: fx.GraphModule) -> list[Finding]:
    """Return the operations of a trace that are not known to keep a bound of 1."""
    found = []
    for node in traced.graph.nodes:
        called = node.op in ("call_function", "call_method")
        if not called or operations.is_size(node) or not operations.is_signal(node):
            continue
        factor, note = _factor(node)
        if factor is None or factor > 1:
            stack = list(node.meta.get("nn_module_stack") or {})
            what = getattr(node.target, "__name__", str(node.target))
            found.append(Finding(stack[-1] if stack else "", what, factor, note))
    return found


def _factor(node: fx.Node) -> tuple[float | None, str]:
    """The factor of an operation as far as it is known without the shapes."""
    target = node.target
    signals = [n for n in operations.flat_nodes(node.args) if operations.is_signal(n)]
    if target in operations.ADD:
        return sum(map(_weight, signals)), "average instead: 0.5 * x + 0.5 * f(x)"
    if target in operations.JOIN:
        return math.hypot(*map(_weight, signals)), "scale the parts, or split the channels before"
    scales = target in operations.MULTIPLY or target in operations.DIVIDE
    if target in operations.PRODUCTS or (scales and len(signals) > 1):
        return math.inf, "a product of two signals is not Lipschitz"
    if scales:
        is_number = node.all_input_nodes == signals
        return (_weight(node), "scales up") if is_number else (None, "scales by a tensor")
    if target in operations.VIEWS or target in operations.MEANS or target in operations.INDEX:
        return 1.0, ""
    make = operations.MODULES.get(target)
    if make is None or any(isinstance(a, fx.Node) for a in node.args[1:]):
        return None, "its bound is not known"
    return module_factor(operations.as_module(node, make))[:2]


def _weight(node: fx.Node) -> float:
    """The factor of a product with a number, 1 for anything else."""
    numbers = [a for a in node.args if isinstance(a, int | float)]
    if numbers and node.target in operations.MULTIPLY:
        return abs(float(numbers[0]))
    if numbers and node.target in operations.DIVIDE:
        return math.inf if numbers[0] == 0 else abs(1 / numbers[0])
    return 1.0
