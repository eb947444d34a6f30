"""Which layers of a network `convert` changes, and the change of one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lipfast.certify.factors import runs_forward_of
from lipfast.nn import METHODS, LipschitzConv2d, LipschitzLinear, LipschitzModule, MaxMin
from lipfast.nn.options import split_options

from .adopt import _shell
from .rules import Replacement, Unsupported

# whose layer is near the one that it replaces, so that its weights are a start
_NEAR = {"aol", "lot"}
_NEAR_LINEAR = {*_NEAR, "bcop"}
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus),
)


class Conversion(NamedTuple):
    """A layer that was checked: its new class and arguments, and whether to keep its parameters."""

    module: nn.Module
    layer: type[nn.Module]
    arguments: dict[str, Any]
    keep: bool


Plan = dict[nn.Module, Conversion | Unsupported]


def planned(model: nn.Module, method: str, activation: str | None, options: dict[str, Any]) -> Plan:
    """What to do with each layer that is to be converted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: convert expected a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if activation not in (None, "maxmin"):
        raise ValueError(f"activation: convert expected 'maxmin' or None, got {activation!r}")
    conv, linear = METHODS[method].conv, METHODS[method].linear
    conv_options, linear_options = split_options(options, conv, linear)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"model: convert expected initialised layers, got a lazy one at {name}; run the "
                "network once before"
            )
    plan: Plan = {}
    for module in visited(model):
        try:
            if runs_forward_of(module, nn.Conv2d):
                arguments = {**_conv_arguments(module, conv), **conv_options}
                plan[module] = _checked(module, conv, arguments, method in _NEAR)
            elif runs_forward_of(module, nn.Linear):
                arguments = {
                    "in_features": module.in_features,
                    "out_features": module.out_features,
                    "bias": module.bias is not None,
                    **linear_options,
                }
                plan[module] = _checked(module, linear, arguments, method in _NEAR_LINEAR)
            elif activation and type(module) in _ACTIVATIONS:
                plan[module] = Conversion(module, MaxMin, {}, keep=False)
        except Unsupported as reason:
            plan[module] = reason
    _refuse_broken_ties(model, plan)
    known = any(isinstance(m, LipschitzModule) for m in model.modules())
    if not known and not any(isinstance(entry, Conversion) for entry in plan.values()):
        reasons = "; ".join(dict.fromkeys(map(str, plan.values())))
        raise ValueError(
            "model: convert expected a network with an nn.Conv2d or nn.Linear that it can convert, "
            f"got none in {type(model).__name__}" + (f" ({reasons})" if reasons else "")
        )
    return plan


def visited(model: nn.Module) -> list[Any]:
    """The modules whose class may change: not the insides of torch's own layers and of lipfast's.

    These read the weights of their parts, as attention does, without calling them.
    """
    found: list[nn.Module] = []
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

    def visit(module: nn.Module) -> None:
        if module in found:
            return
        found.append(module)
        own = type(module).__module__.startswith("torch.nn.modules.")
        whole = isinstance(module, LipschitzModule) or parametrize.is_parametrized(module)
        if isinstance(module, containers) or not (own or whole):
            for child in module.children():
                visit(child)

    visit(model)
    return found


def _conv_arguments(module: nn.Conv2d, layer: type[LipschitzConv2d]) -> dict[str, Any]:
    padding_mode: str = module.padding_mode
    if padding_mode == "zeros" and padding_mode not in layer._padding_modes:
        padding_mode = layer._padding_modes[0]
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "bias": module.bias is not None,
        "padding_mode": padding_mode,
    }


def _checked(
    module: Any,
    layer: type[LipschitzConv2d] | type[LipschitzLinear],
    arguments: dict[str, Any],
    near: bool,
) -> Conversion:
    """Check that the layer can be built, on the meta device, and whether the weights fit.

    Raises:
        Unsupported: with the reason.
    """
    if "forward" in module.__dict__:
        raise Unsupported("its forward function was replaced on the object")
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)
        raise Unsupported(f"its {names} is parametrised; remove_parametrizations before")
    if "weight" not in module._parameters:
        raise Unsupported("its weight is not a parameter")
    own = _own_methods(module)
    if own:
        raise Unsupported(f"its class defines {', '.join(own)}, which would be lost")
    shell: Any = _shell(Replacement(layer, arguments), module.weight.dtype)
    keep = near and shell.weight.shape == module.weight.shape
    return Conversion(module, layer, arguments, keep)


def _own_methods(module: nn.Module) -> list[str]:
    """What a subclass of torch's class adds, its initialisation apart."""
    kinds = [k for k in type(module).__mro__ if not k.__module__.startswith(("torch.", "builtins"))]
    names = [n for kind in kinds for n, value in vars(kind).items() if callable(value)]
    return [n for n in names if n not in ("__init__", "reset_parameters", "extra_repr")]


def _refuse_broken_ties(model: nn.Module, plan: Plan) -> None:
    """Leave a layer alone that would lose a parameter that a module outside shares with it."""
    for module, entry in plan.items():
        if not isinstance(entry, Conversion) or entry.keep:
            continue
        own = {id(p) for p in module._parameters.values() if p is not None}
        for path, other in model.named_modules():
            partner = plan.get(other)
            follows = isinstance(partner, Conversion) and not partner.keep
            if other is module or (follows and partner.layer is entry.layer):  # type: ignore[union-attr]
                continue
            for name, parameter in other._parameters.items():
                if id(parameter) in own:
                    where = f"{path}.{name}".lstrip(".")
                    plan[module] = Unsupported(f"it shares a parameter with {where}; untie them")


def perform(plan: Plan) -> None:
    made: dict[int, nn.Parameter] = {}  # of tied layers, by the parameter before
    for entry in plan.values():
        if isinstance(entry, Conversion):
            _replace(entry, made)


@torch.no_grad()
def _replace(conversion: Conversion, made: dict[int, nn.Parameter]) -> None:
    """Make the module an instance of the new class: the object, its hooks and name stay."""
    module, old = conversion.module, dict(conversion.module._parameters)
    weight = old.get("weight")
    if not isinstance(weight, Tensor) or not issubclass(conversion.layer, LipschitzModule):
        new = conversion.layer(**conversion.arguments)
    elif conversion.keep or weight.is_meta:
        new = _shell(Replacement(conversion.layer, conversion.arguments), weight.dtype)
        for name, buffer in new._buffers.items():
            if buffer is not None:
                new._buffers[name] = torch.zeros_like(buffer, device=weight.device)
    else:
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        new = conversion.layer(**conversion.arguments, **factory)
    for name, parameter in new._parameters.items():
        before = old.get(name)
        if parameter is None or not isinstance(before, nn.Parameter):
            continue
        if conversion.keep:
            new._parameters[name] = before
        else:
            parameter.requires_grad_(before.requires_grad)
            new._parameters[name] = made.setdefault(id(before), parameter)
    if not any(p.requires_grad for p in old.values() if p is not None):
        for parameter in new.parameters():
            parameter.requires_grad_(False)
    stays = {name for name in nn.Module().__dict__ if name not in ("_parameters", "_buffers")}
    module.__dict__.update({k: v for k, v in new.__dict__.items() if k not in stays})
    module.__class__ = conversion.layer
