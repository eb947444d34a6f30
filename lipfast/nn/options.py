"""The options of a method that go beyond those of `torch.nn.Conv2d` and `torch.nn.Linear`."""

import inspect
from collections.abc import Mapping
from typing import Any

from .base import LipschitzModule

_SHARED = ("bias", "padding_mode")


def option_names(layer: type[LipschitzModule]) -> tuple[str, ...]:
    """Return the options of a layer: "bias", "padding_mode" where it pads, and the method's own.

    The method's own are the arguments of its `__init__` that are keywords only.
    """
    names = [name for name in _SHARED if name != "padding_mode" or not layer._linear]
    for kind in layer.__mro__:
        if issubclass(kind, LipschitzModule) and "__init__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            names += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return tuple(names)


def split_options(
    options: Mapping[str, Any], conv: type[LipschitzModule], linear: type[LipschitzModule]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that the convolutions and the linear layers of a network take.

    Raises:
        TypeError: neither layer takes one of them.
    """
    known = [option_names(layer) for layer in (conv, linear)]
    unknown = [name for name in options if name not in known[0] + known[1]]
    if unknown:
        raise TypeError(
            f"layer_options: {conv.__name__} takes {', '.join(known[0])}, got {unknown[0]!r}"
        )
    first, second = ({n: v for n, v in options.items() if n in names} for names in known)
    return first, second
