"""Lipschitz bounds along the traced graph of a network with any forward pass."""

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import operations
from .factors import is_known, module_factor

Check = Callable[[str, nn.Module], None]


def graph_bound(model: nn.Module, example: Tensor, check: Check | None = None) -> float:
    """Return a proved Lipschitz constant of a traced network for inputs of the example's shape.

    Args:
        model: traceable by `torch.fx`; runs in evaluation mode, its modes are restored.
        example: (n, ...).
        check: called with the name of each layer and the layer, to refuse it.

    Raises:
        TypeError: the network cannot be traced, or an operation has no known bound.
    """
    with evaluation_mode(model), torch.no_grad():
        traced = trace(model)
        names = [n.name for n in traced.graph.nodes if n.op == "placeholder"]
        if len(names) != 1:
            raise TypeError(f"model: expected a network of one input, got {', '.join(names)}")
        interpreter = _Bounds(traced, check)
        result = interpreter.run(example.clone())  # the network may write into its input
        # a trace forgets what `x += y` does to other names of x
        if not _is_close(result, model(example.clone())):
            raise TypeError(
                f"model: the traced graph of {type(model).__name__} computes something else than "
                "its forward pass, so that its bound is not known"
            )
    return interpreter.bound


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a network with its layers as leaves.

    Raises:
        TypeError: torch.fx cannot follow its forward pass.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the forward pass does with a proxy
        raise TypeError(
            f"model: torch.fx could not trace the forward pass of {type(model).__name__}, so that "
            f"its bound is not known: {error}"
        ) from error
    return fx.GraphModule(model, graph)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set `training` to False, without the calls of `eval()` that drop cached weights."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, training in modes:
            if training:
                module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Proxy(fx.Proxy):
    """Keeps `x += y` in the trace as what it is: it changes every other name of x too."""

    def _in_place(self, operation: Callable[[Any, Any], Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_known(m) or super().is_leaf_module(m, module_qualified_name)


class _Bounds(fx.Interpreter):
    """Runs the network and keeps the Lipschitz constant of each tensor in the network's input."""

    def __init__(self, module: fx.GraphModule, check: Check | None) -> None:
        super().__init__(module, garbage_collect_values=False)  # storages identify aliases
        self.extra_traceback = False
        self.check = check
        self.constants: dict[fx.Node, float] = {}
        self.bound = math.inf

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        constant = self._constant(n, result)
        if not all(t.is_floating_point() for t in _tensors(result)) and constant:
            raise _unknown(n, "its output is not a real tensor")
        self.constants[n] = constant
        if n.op == "output":
            self.bound = constant
        else:
            self._mark_aliases(n, result)
        return result

    def _constant(self, node: fx.Node, result: Any) -> float:
        inputs = [(n, self.constants[n]) for n in node.all_input_nodes]
        if node.op == "placeholder":
            return 1.0
        if node.op == "output":
            return math.hypot(*(self.constants[n] for n in operations.flat_nodes(node.args)))
        if all(c == 0 for _, c in inputs) or operations.is_size(node):
            return 0.0  # a parameter, a size, or made of these
        if not list(_tensors(result)):
            raise _unknown(node, "it takes numbers from a signal")
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            if self.check is not None:
                self.check(str(node.target), module)
            return self._factor_of(node, module, result) * _only(node, inputs)
        merged = self._merged(node, result)
        if merged is not None:
            return merged
        return self._factor(node, result) * _only(node, inputs)

    def _merged(self, node: fx.Node, result: Any) -> float | None:
        if node.target in operations.ADD:
            if node.kwargs:
                raise _unknown(node, "it has keywords")
            return sum(self._expanded(n, result) for n in operations.flat_nodes(node.args))
        if node.target in operations.JOIN:
            joined = operations.flat_nodes((node.args, node.kwargs))
            return math.hypot(*(self.constants[n] for n in joined))
        if node.target in operations.MULTIPLY or node.target in operations.DIVIDE:
            return self._scaled(node, result)
        return None

    def _expanded(self, node: fx.Node, result: Any) -> float:
        """The constant of a summand that broadcasting may repeat."""
        constant = self.constants[node]
        return constant and constant * _repeats(self.env[node], result)

    def _scaled(self, node: fx.Node, result: Any) -> float:
        if node.kwargs or len(node.args) != 2:
            raise _unknown(node, "it has keywords")
        first, second = node.args
        if isinstance(second, fx.Node) and self.constants[second]:
            if node.target in operations.DIVIDE:
                raise _unknown(node, "a quotient of two signals is not Lipschitz")
            first, second = second, first
        if not isinstance(first, fx.Node) or (
            isinstance(second, fx.Node) and self.constants[second]
        ):
            raise _unknown(node, "a product of two signals is not Lipschitz")
        value = self.env[second] if isinstance(second, fx.Node) else second
        value = torch.as_tensor(value).detach().double()
        if node.target in operations.DIVIDE:
            value = 1 / value
        if not bool(value.isfinite().all()):
            raise _unknown(node, "its factor is not finite")
        return float(value.abs().amax()) * self._expanded(first, result)

    def _factor(self, node: fx.Node, result: Any) -> float:
        target: Any = node.target
        if target in operations.VIEWS:
            return self._view(node, result)
        if target in operations.INDEX and operations.is_slice(node.args[1]):
            return 1.0
        if target in operations.MEANS | operations.SUMS | operations.EXPANSIONS:
            ratio = result.numel() / self.env[node.all_input_nodes[0]].numel()
            return math.sqrt(1 / ratio if target in operations.SUMS else ratio)
        make = operations.MODULES.get(target)
        if make is None or any(isinstance(a, fx.Node) for a in node.args[1:]):
            raise _unknown(node, "its bound is not known")
        if target is F.dropout and True in (*node.args[2:3], node.kwargs.get("training")):
            raise _unknown(node, "dropout that is on in evaluation mode has no bound")
        return self._factor_of(node, operations.as_module(node, make), result)

    def _view(self, node: fx.Node, result: Any) -> float:
        sources = [n for n in node.all_input_nodes if self.constants[n]]
        before = [t for n in sources for t in _tensors(self.env[n])]
        if sum(t.numel() for t in _tensors(result)) > sum(t.numel() for t in before):
            raise _unknown(node, "it repeats entries")
        if node.target == "view" and result.dtype != before[0].dtype:
            raise _unknown(node, "it takes numbers for those of another type")
        return 1.0

    def _factor_of(self, node: fx.Node, module: nn.Module, result: Any) -> float:
        name = f" ({type(module).__name__})" if node.op == "call_module" else ""
        if isinstance(module, operations.ADAPTIVE):
            factor = self._adaptive(node, module)
        else:
            factor = module_factor(module)[0]
        if factor is None or not math.isfinite(factor):
            raise _unknown(node, module_factor(module).note, name)
        if isinstance(module, nn.Upsample):
            return _repeats(self.env[node.all_input_nodes[0]], result)
        return factor

    def _adaptive(self, node: fx.Node, module: Any) -> float | None:
        """Of windows that do not overlap, or all of one pixel, as this map makes them."""
        source, axes = self.env[node.all_input_nodes[0]], int(type(module).__name__[-2])
        size = module.output_size
        sizes = size if isinstance(size, tuple | list) else (size,) * axes
        pairs = list(zip(source.shape[-axes:], sizes, strict=True))
        if any(m is not None and n % m for n, m in pairs):
            return None
        if "Max" in type(module).__name__:
            return 1.0
        return math.sqrt(math.prod(1 if m is None else m / n for n, m in pairs))

    def _mark_aliases(self, node: fx.Node, result: Any) -> None:
        """An operation in place changes every tensor that shares its memory."""
        storages = {t.untyped_storage().data_ptr() for t in _tensors(result) if t.numel()}
        for other in node.all_input_nodes if _writes(node, self) else ():
            if any(
                t.untyped_storage().data_ptr() in storages for t in _tensors(self.env.get(other))
            ):
                for alias, value in self.env.items():
                    shared = [
                        t for t in _tensors(value) if t.untyped_storage().data_ptr() in storages
                    ]
                    if any(_is_expanded(t) for t in shared):
                        raise _unknown(node, "it writes into what an expansion repeats")
                    if shared:
                        self.constants[alias] = max(self.constants[alias], self.constants[node])


def _writes(node: fx.Node, interpreter: fx.Interpreter) -> bool:
    if node.op == "call_module":
        return bool(getattr(interpreter.fetch_attr(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name in ("iadd", "isub", "imul", "itruediv")
    positional = any(argument is True for argument in node.args)  # F.relu(x, True)
    return bool(node.kwargs.get("inplace")) or in_place or name.endswith("_") or positional


def _is_expanded(value: Tensor) -> bool:
    sizes = zip(value.shape, value.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in sizes)


def _is_close(first: Any, second: Any) -> bool:
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True) for a, b in pairs)


def _only(node: fx.Node, inputs: list[tuple[fx.Node, float]]) -> float:
    signals = [constant for _, constant in inputs if constant]
    if len(signals) > 1:
        raise _unknown(node, "it takes several signals")
    return signals[0]


def _repeats(value: Any, result: Tensor) -> float:
    return math.sqrt(result.numel() / value.numel()) if isinstance(value, Tensor) else 1.0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _unknown(node: fx.Node, reason: str, detail: str = "") -> TypeError:
    return TypeError(
        f"model: expected operations with a known Lipschitz bound, got {node.target}{detail} at "
        f"{node.name!r}: {reason}"
    )
