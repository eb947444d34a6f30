"""Channels that no layer needs to compute: of ZeroChannelPad before one, of FirstChannels after."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from lipfast.nn import FirstChannels, LipschitzLinear, LipschitzModule, MaxMin, ZeroChannelPad

from .sizes import Shapes

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Merged:
    """By the id of a module of the network."""

    inputs: dict[int, int] = field(default_factory=dict)  # channels of the input of a layer
    outputs: dict[int, int] = field(default_factory=dict)  # channels that it computes
    channels: dict[int, int] = field(default_factory=dict)  # of the input of a MaxMin
    dropped: set[int] = field(default_factory=set)  # modules that have become the identity


def merge(model: nn.Module, shapes: Shapes) -> Merged:
    """Find what may be left out in the chains of `nn.Sequential`.

    A layer after ZeroChannelPad needs the weights of its input's channels only. A layer before
    FirstChannels(k), or before MaxMin and FirstChannels(k), needs its first k outputs, or k + 1
    where MaxMin needs pairs. Each module must stand and run in one place only, without hooks, and
    the chain itself run: its modules may be called one by one instead, for more than the next one.
    """
    merged = Merged()
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for chain in _chains(model, shapes):
        for at, module in enumerate(chain):
            before, after = chain[max(0, at - 2) : at], chain[at + 1 : at + 2]
            near = [*before, module, *after]
            free = {id(m) for m in near if _runs_once(m, places, shapes)}
            if id(module) not in free:
                continue
            if type(module) is ZeroChannelPad and after and id(after[0]) in free:
                _merge_pad(module, after[0], shapes, merged)
            if type(module) is FirstChannels:
                _merge_first(
                    module, [m for m in before if id(m) in free], chain[:at], merged, shapes
                )
    return merged


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _merge_pad(pad: ZeroChannelPad, layer: nn.Module, shapes: Shapes, merged: Merged) -> None:
    if isinstance(layer, LipschitzModule) and layer.groups == 1:
        (shape,) = shapes[id(pad)]
        merged.inputs[id(layer)] = shape[1] * getattr(layer, "_downscale", 1) ** 2
        merged.dropped.add(id(pad))


def _merge_first(
    first: FirstChannels,
    free: list[nn.Module],
    before: list[nn.Module],
    merged: Merged,
    shapes: Shapes,
) -> None:
    activation = before[-1] if before and type(before[-1]) is MaxMin else None
    layer = before[-2:-1] if activation is not None else before[-1:]
    needed = first.channels + (first.channels % 2 if activation is not None else 0)
    if (
        not layer
        or not isinstance(layer[0], LipschitzModule)
        or not all(m in free for m in (layer[0], activation) if m is not None)
        or layer[0].groups > 1
        or len(shapes[id(layer[0])][0]) != (2 if isinstance(layer[0], LipschitzLinear) else 4)
        or needed > layer[0].out_channels
    ):
        return
    merged.outputs[id(layer[0])] = needed
    if activation is not None:
        merged.channels[id(activation)] = needed
    if needed == first.channels:
        merged.dropped.add(id(first))


def _chains(model: nn.Module, shapes: Shapes) -> Iterator[list[nn.Module]]:
    """The modules of each `nn.Sequential` that runs, in order, those of nested ones in place."""
    inside = {id(m) for s in model.modules() if _is_chain(s) for m in s.children() if _is_chain(m)}
    for module in model.modules():
        nested = [m for m in module.modules() if _is_chain(m)]
        runs = all(len(shapes.get(id(m), ())) == 1 for m in nested)
        if _is_chain(module) and id(module) not in inside and runs:
            yield _links(module)


def _links(chain: nn.Module) -> list[nn.Module]:
    links = []
    for module in chain._modules.values():
        if module is not None:
            links += _links(module) if _is_chain(module) else [module]
    return links


def _is_chain(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and not has_hooks(module)
    )


def _runs_once(module: nn.Module, places: Counter[int], shapes: Shapes) -> bool:
    key = id(module)
    return places[key] == 1 and len(shapes.get(key, ())) == 1 and not has_hooks(module)
