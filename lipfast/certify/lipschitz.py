"""Sound Lipschitz bounds of layers and of networks."""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as modules

from .factors import has_other_forward, is_known, module_factor, runs_forward_of
from .graph import evaluation_mode, graph_bound


def lipschitz_bounds(model: nn.Module) -> dict[str, float]:
    """Return the proved bound of every layer with parameters, by its name in the model.

    Euclidean norm, evaluation mode, float64: the layer's own `lipschitz_bound()`, and upper bounds
    for those of torch's own layers that have one, see `lipfast.certify.factors`.

    Raises:
        ValueError: a layer whose weights depend on the map has not seen an input yet.
        TypeError: a layer with parameters has no known bound.
    """
    return _bounds(model, known_only=False)


def known_bounds(model: nn.Module) -> dict[str, float]:
    """Return `lipschitz_bounds` of the layers that have one."""
    return _bounds(model, known_only=True)


def _bounds(model: nn.Module, *, known_only: bool) -> dict[str, float]:
    bounds: dict[str, float] = {}
    with evaluation_mode(model):
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{other}.") for other in bounds)
            has_parameters = next(module.parameters(recurse=False), None) is not None
            if not inside and has_parameters and (is_known(module) or not known_only):
                bounds[name] = _layer_bound(name, module)
    return bounds


def lipschitz_bound(model: nn.Module, example: Tensor | None = None) -> float:
    """Return a proved Lipschitz constant of a network in evaluation mode.

    The product of the bounds of the layers of an `nn.Sequential`, nested ones included. A module
    with a method `lipschitz_bound()` is taken at its word; of torch's own modules those that are
    known, unless a subclass has another `forward` or a hook may change the output.

    With an example, any network that `torch.fx` can trace is bounded along its graph, where
    constants add up at residual additions and are joined as sqrt(a^2 + b^2) at concatenations. The
    bound then holds for inputs of the example's shape.

    Args:
        model: the network.
        example: an input, (n, ...), on which the network runs once, without gradient.

    Raises:
        ValueError: a layer whose weights depend on the map has not seen an input yet.
        TypeError: a module is neither such a chain nor a layer with a known bound, or has hooks, or
            the network cannot be traced or has an operation without a known bound.
    """
    with evaluation_mode(model):
        return _chain_bound("", model, example)


def bound_for_any_batch(model: nn.Module, example: Tensor | None) -> float:
    """Return `lipschitz_bound` for inputs of the example's shape and any number of them.

    Raises as `lipschitz_bound`, and a TypeError where the bound depends on how many there are.
    """
    try:
        return lipschitz_bound(model)
    except TypeError:
        if example is None:
            raise
    few, more = (
        lipschitz_bound(model, example[:1].expand(n, *example.shape[1:]).clone()) for n in (1, 3)
    )
    if not math.isclose(few, more, rel_tol=1e-9):
        raise TypeError("model: its bound depends on the size of the batch")
    return max(few, more)


def _chain_bound(name: str, module: Any, example: Tensor | None) -> float:
    check_hooks(name, module)
    if hasattr(module, "lipschitz_bound") or has_other_forward(module):
        return _layer_bound(name, module)
    if example is not None:
        return graph_bound(module, example, check_hooks)
    if runs_forward_of(module, nn.Sequential):
        # not named_children(), which skips a layer that stands in the chain a second time
        parts = module._modules.items()
        return math.prod(_chain_bound(f"{name}.{key}".lstrip("."), m, None) for key, m in parts)
    return _layer_bound(name, module)


def check_hooks(name: str, module: Any) -> None:
    """Raise a TypeError where hooks stand around a module's forward pass, lipfast's apart."""
    if not isinstance(module, nn.Module):
        return
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *modules._global_forward_hooks.values(),
        *modules._global_forward_pre_hooks.values(),
    )
    # those of fuse and shard change no output
    if any(str(getattr(h, "__module__", "")).partition(".")[0] != "lipfast" for h in hooks):
        raise TypeError(
            f"model: expected layers without forward hooks, which may change their output, got "
            f"some on {type(module).__name__} at {name or 'the top'!r}"
        )


def _layer_bound(name: str, module: Any) -> float:
    try:
        factor = module_factor(module)
    except ValueError as error:
        raise ValueError(f"{name}.{error}" if name else str(error)) from error
    if factor.value is None or not math.isfinite(factor.value):
        note = f" ({factor.note})" if factor.note else ""
        raise TypeError(
            f"model: expected layers with a known Lipschitz bound in a chain of nn.Sequential, got "
            f"{type(module).__name__} at {name or 'the top'!r}{note}; give an example input for a "
            "network with another forward pass"
        )
    return factor.value
