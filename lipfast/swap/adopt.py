"""Turn a foreign module into a lipfast layer, in place, with its own parameters."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .rules import Replacement, Unsupported, View

Views = tuple[tuple[str, View], ...]

_CLASSES: dict[tuple[type[nn.Module], Views], type[nn.Module]] = {}


class Adoption:
    """A replacement that was checked against its module: `perform` cannot fail half way."""

    def __init__(self, module: nn.Module, replacement: Replacement) -> None:
        """Check the module, and build the layer without memory for its parameters.

        Raises:
            Unsupported: the module is not what the rule takes it for.
        """
        self.module = module
        self.replacement = replacement
        _check_module(module, replacement)
        self.device, self.dtype = _place(module)
        self.shell = _shell(replacement, self.dtype)
        self.views = _checked_views(module, self.shell, replacement)
        self.layer = adopted_class(replacement.layer, self.views)
        if self.layer.__basicsize__ != type(module).__basicsize__:
            raise Unsupported("its class has slots")

    def perform(self) -> None:
        """Make the module a lipfast layer: the object, its parameters, hooks and names stay."""
        module = self.module
        module.__class__ = self.layer
        for name in (*self.replacement.forget, *self.shell._parameters):
            module.__dict__.pop(name, None)
        for name, parameter in self.shell._parameters.items():
            if parameter is None and name not in dict(self.views):
                module._parameters.setdefault(name, None)
        own = nn.Module().__dict__
        module.__dict__.update({k: v for k, v in self.shell.__dict__.items() if k not in own})
        for name, buffer in self.shell._buffers.items():
            if buffer is not None and not hasattr(module, name):
                zeros = torch.zeros_like(buffer, device=self.device)
                module.register_buffer(name, zeros, persistent=False)
        if self.replacement.finish is not None:
            with torch.no_grad():
                self.replacement.finish(module)


def adopted_class(layer: type[nn.Module], views: Views) -> type[nn.Module]:
    """Return `layer` with properties in place of the parameters that `views` names.

    The class is made on demand; its instances can be copied and pickled all the same.
    """
    if not views:
        return layer
    if (layer, views) not in _CLASSES:
        getters = {
            name: property(_reader(view) if isinstance(view, str) else view) for name, view in views
        }
        body = {
            "__doc__": layer.__doc__,
            "__module__": layer.__module__,
            "_adopted": (layer, views),
            **getters,
        }
        _CLASSES[layer, views] = type(f"Adopted{layer.__name__}", (_Adopted, layer), body)
    return _CLASSES[layer, views]


def _reader(path: str) -> Callable[[nn.Module], Any]:
    """As `operator.attrgetter`, which torch.compile cannot trace."""
    names = path.split(".")

    def read(module: nn.Module) -> Any:
        value: Any = module
        for name in names:
            value = getattr(value, name)
        return value

    return read


class _Adopted(nn.Module):
    _adopted: tuple[type[nn.Module], Views]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        return (_new_instance, self._adopted, *reduced[2:])


def _new_instance(layer: type[nn.Module], views: Views) -> nn.Module:
    kind = adopted_class(layer, views)
    return kind.__new__(kind)


def _check_module(module: nn.Module, replacement: Replacement) -> None:
    if "forward" in module.__dict__:
        raise Unsupported("its forward function was replaced on the object")
    found = {}
    if parametrize.is_parametrized(module):
        for name, entries in module.parametrizations.items():  # type: ignore[union-attr,operator]
            found[name] = " and ".join(type(entry).__name__ for entry in entries)
    for name, kind in found.items():
        if replacement.parametrizations.get(name) != kind:
            raise Unsupported(f"{name} is parametrised by {kind}")
    for name, kind in replacement.parametrizations.items():
        if name not in found:
            raise Unsupported(f"{name} is not parametrised by {kind}")


def _place(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype of the module's parameters, None where there are none."""
    parameters = list(module.named_parameters())
    for attribute in ("device", "dtype"):
        values = {getattr(parameter, attribute): name for name, parameter in parameters}
        if len(values) > 1:
            listed = ", ".join(f"{name} on {value}" for value, name in values.items())
            listed = listed if attribute == "device" else listed.replace(" on ", " of ")
            raise Unsupported(f"its parameters differ in {attribute}: {listed}")
    if not parameters:
        return None, None
    parameter = parameters[0][1]
    return parameter.device, parameter.dtype


def _shell(replacement: Replacement, dtype: torch.dtype | None) -> nn.Module:
    """The layer on the meta device, without initial values."""
    factory = {} if dtype is None else {"device": "meta", "dtype": dtype}
    kind = type("Shell", (replacement.layer,), {"reset_parameters": lambda self: None})
    try:
        return kind(**replacement.arguments, **factory)
    except ValueError as error:
        raise Unsupported(str(error).replace("Shell", replacement.layer.__name__)) from error


def _checked_views(module: nn.Module, shell: nn.Module, replacement: Replacement) -> Views:
    """The views that need a property, once all parameters are found and have the right shapes."""
    needed = []
    for name, expected in shell._parameters.items():
        view = replacement.views.get(name, name)
        try:
            found = operator.attrgetter(view)(module) if isinstance(view, str) else view(module)
        except (AttributeError, KeyError) as error:
            raise Unsupported(f"its parameter for the {name} is missing: {error}") from error
        if isinstance(found, Tensor) != isinstance(expected, Tensor):
            raise Unsupported(f"expected {_described(expected)} as the {name}, got {found!r}")
        if isinstance(found, Tensor) and expected is not None and found.shape != expected.shape:
            raise Unsupported(
                f"expected {_described(expected)} as the {name}, got {_described(found)}"
            )
        if view != name:
            needed.append((name, view))
        elif found is not None and name not in module._parameters:
            raise Unsupported(f"its {name} is not a parameter")
    return tuple(needed)


def _described(value: Tensor | None) -> str:
    return "no tensor" if value is None else f"a tensor {tuple(value.shape)}"
