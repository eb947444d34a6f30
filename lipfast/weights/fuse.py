"""All weights of equal shape in one batched call before a model's forward pass."""

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lipfast.nn.base import LipschitzModule, Prebuilt
from lipfast.nn.spectral import SpectralModule

from . import plan

_Model = TypeVar("_Model", bound=nn.Module)

# Up to these sizes of a layer batches are faster on a CPU, for every method: numbers in the weight
# (five layers at once 1.05 to 3.4 times; from 9 128^2 on 0.84 times for SOC to 1.3 times for CPL),
# and in the transfer matrices of LOT and Cayley (1.1 to 1.2 times; beyond, a training step is up to
# a tenth slower). Measured with one thread by bench/bench_fuse.py. On a GPU fewer launches pay.
_CPU_WEIGHT = 1 << 17
_CPU_TRANSFER_MATRICES = 320_000


def fuse(model: _Model) -> _Model:
    """Build the training weights of layers that are built alike in one call, in place.

    In training mode each forward pass of the model first builds, in one batch per group, the
    weights of all lipfast layers of one method, shape, dtype, device, configuration and, where they
    depend on it, map size; the layers take them, and afterwards they are gone. Outputs, gradients
    and buffers are those of the model as it was, to rounding. Layers that fit into no group, or
    whose map size is not known yet or changes, build their weights themselves, as do all layers in
    evaluation mode. On a CPU so do layers that are too large to gain.

    Works under `torch.compile` (call it first), autocast and DistributedDataParallel, and on copies
    of the model; parameters, buffers and the state dict stay as they are. Call it on what is
    checkpointed (`torch.utils.checkpoint`), not on a model around it: the recomputation runs the
    hooks of that module alone. A layer that a forward pass leaves out gets zero as its gradient, in
    place of None, where others of its group run. Where the map size changes, CPL's power vectors
    make one more step, for the old size. Calling it again changes nothing.

    Args:
        model: with at least one lipfast layer; of a DistributedDataParallel the inner module.

    Returns:
        The same model.

    Raises:
        TypeError: model is no module.
        ValueError: it has no lipfast layer, or it has been compiled.
    """
    inner = _inner(model, "fuse")
    if not plan.lipschitz_layers(inner):
        raise ValueError(
            f"fuse: expected a model with lipfast layers, got {type(inner).__name__} without any; "
            "lipfast.accelerate and lipfast.convert make some"
        )
    if is_fused(inner):
        return model
    inner.register_forward_pre_hook(_build)
    inner.register_forward_hook(_take_away, always_call=True)
    return model


def unfuse(model: _Model) -> _Model:
    """Undo `fuse`, in place; a model that is not fused stays as it is.

    Raises:
        TypeError: model is no module.
        ValueError: it has been compiled.
    """
    inner = _inner(model, "unfuse")
    for hooks, ours in ((inner._forward_pre_hooks, _build), (inner._forward_hooks, _take_away)):
        for number in [number for number, hook in hooks.items() if hook is ours]:
            del hooks[number]
            inner._forward_hooks_always_called.pop(number, None)
    return model


def is_fused(model: nn.Module) -> bool:
    """Return whether `fuse` was called on this module itself."""
    return any(hook is _build for hook in model._forward_pre_hooks.values())


def _inner(model: nn.Module, name: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if isinstance(inner, torch._dynamo.OptimizedModule) or inner._compiled_call_impl is not None:
        raise ValueError(
            f"{name}: the model has been compiled; call {name} before torch.compile, "
            "whose graphs do not look at hooks again"
        )
    return inner


# Functions of the module that they are hooks of, so that they are right on a copy of it.


def _build(model: nn.Module, args: Any) -> None:
    layers, map_sizes = [], []
    candidates = list(plan.lipschitz_layers(model).values())
    for layer, map_size in zip(candidates, _expected_map_sizes(model, candidates), strict=True):
        if map_size is None or not layer.training or layer.prebuilt is not None:
            continue
        if _pays(layer, map_size):
            layers.append(layer)
            map_sizes.append(map_size)
    built = []
    for members, sizes in plan.groups(layers, map_sizes):
        if len(members) > 1:
            built.append((members, sizes, plan.build(members, sizes)))
    for members, sizes, weights in built:
        for layer, map_size, prebuilt in zip(members, sizes, weights, strict=True):
            layer.prebuilt = Prebuilt(map_size, prebuilt)


_sizes_of_last_pass: WeakKeyDictionary[nn.Module, list[plan.MapSize | None]] = WeakKeyDictionary()


def _expected_map_sizes(
    model: nn.Module, layers: list[LipschitzModule]
) -> list[plan.MapSize | None]:
    """Map sizes for the next pass; for one that checkpointing repeats, those of the pass itself."""
    sizes = [plan.expected_map_size(layer) for layer in layers]
    if torch.compiler.is_compiling():
        return sizes
    if torch._C._current_graph_task_id() != -1:  # inside a backward pass
        last = _sizes_of_last_pass.get(model, sizes)
        return last if len(last) == len(sizes) else sizes
    _sizes_of_last_pass[model] = sizes
    return sizes


def _pays(layer: LipschitzModule, map_size: plan.MapSize) -> bool:
    if layer.weight.device.type != "cpu":
        return True
    if isinstance(layer, SpectralModule) and layer._depends_on_map_size:
        h, w = layer._grid(map_size)
        matrix = layer.out_channels * layer._inner_channels
        return 2 * h * (w // 2 + 1) * matrix <= _CPU_TRANSFER_MATRICES
    return layer.weight.numel() <= _CPU_WEIGHT


def _take_away(model: nn.Module, args: Any, output: Any) -> None:
    for layer in plan.lipschitz_layers(model).values():
        layer.prebuilt = None
