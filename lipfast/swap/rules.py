"""What a rule says: which foreign layer it knows, and which lipfast layer computes the same."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

View = str | Callable[[nn.Module], Tensor | None]


class Unsupported(Exception):
    """A layer of a known class cannot be replaced; the message completes "left alone: ..."."""


class Replacement(NamedTuple):
    """What to make of a module. Nothing happens to the module before `adopt` gets this.

    Attributes:
        layer: class of the lipfast layer, importable by its name.
        arguments: of its constructor, without device and dtype.
        views: where the layer's parameters are found in the module, for every parameter whose name
            or layout differs: a path ("kernel", "parametrizations.weight.original"), or a function
            of the module, importable by its name, that returns a tensor of the shape that the layer
            has, computed from the module's parameters (`module._parameters["weight"]`, should the
            names coincide). Gradients flow through it.
        forget: attributes of the module to delete: weights it has cached, and the like.
        parametrizations: for each parametrised tensor the class name of its one parametrisation,
            which the layer takes over.
        finish: called with the module once it is a lipfast layer, without gradients: fills the
            buffers that the layer has in addition, which are zeros before.
    """

    layer: type[nn.Module]
    arguments: Mapping[str, Any] = {}
    views: Mapping[str, View] = {}
    forget: tuple[str, ...] = ()
    parametrizations: Mapping[str, str] = {}
    finish: Callable[[nn.Module], None] | None = None


class Rule(NamedTuple):
    """How layers of one class are replaced.

    Attributes:
        source: where the class is published, for the report.
        class_name: name of the class, without its parametrisations; subclasses do not match.
        build: called with the module, which it does not change, and `exact`: whether the outputs
            must be those of the module to 1e-4 in training and evaluation mode, or the layer may
            be the best one with the same parameters. Raises `Unsupported`; a ValueError of the
            lipfast layer's constructor counts as one.
        package: the package that defines the class ("orthogonium"); None for code that people copy
            into their projects. It is matched by name and never imported.
    """

    source: str
    class_name: str
    build: Callable[[nn.Module, bool], Replacement]
    package: str | None = None


def defining_class(module: nn.Module) -> type[nn.Module]:
    """Return the module's class, without the one that `torch.nn.utils.parametrize` derives."""
    return parametrize.type_before_parametrizations(module)


def find_rule(rules: tuple[Rule, ...], module: nn.Module) -> Rule | None:
    """Return the rule for the module's class, or None."""
    kind = defining_class(module)
    package = next((r.package for r in rules if r.package and _is_in(kind, r.package)), None)
    for rule in rules:
        if rule.class_name == kind.__name__ and rule.package == package:
            return rule
    return None


def _is_in(kind: type, package: str) -> bool:
    return f"{kind.__module__}.".startswith(f"{package}.")


def expect(module: nn.Module, name: str, *allowed: object) -> None:
    """Raise `Unsupported` where an attribute of the module is none of the `allowed` values.

    A pair or longer tuple of equal numbers counts as the number: strides are (1, 1) or 1.
    """
    value = attribute(module, name)
    if value not in allowed:
        expected = " or ".join(repr(choice) for choice in allowed)
        raise Unsupported(f"{name} is {_shown(value)}, expected {expected}")


def attribute(module: nn.Module, name: str) -> Any:
    """Return an attribute of the module, or one number for a tuple of equal ones.

    Raises:
        Unsupported: the module has no such attribute.
    """
    if not hasattr(module, name):
        raise Unsupported(f"it has no attribute {name!r}")
    value = getattr(module, name)
    if isinstance(value, tuple | list) and value and all(entry == value[0] for entry in value):
        return value[0]
    return value


def _shown(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
