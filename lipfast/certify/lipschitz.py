"""Sound Lipschitz bounds of layers and of networks that are chains of layers."""

import math
from typing import Any

from torch import nn

from lipfast import reference

_NONEXPANSIVE = (
    nn.Dropout,  # the identity in evaluation mode
    nn.Flatten,
    nn.Hardtanh,
    nn.Identity,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Unflatten,
)


def lipschitz_bounds(model: nn.Module) -> dict[str, float]:
    """Return the proved bound of every layer with parameters, by its name in the model.

    Euclidean norm, evaluation mode, float64: the layer's own `lipschitz_bound()`, and upper bounds
    of the spectral norm for plain `nn.Linear` and `nn.Conv2d`.

    Raises:
        ValueError: a layer whose weights depend on the map has not seen an input yet.
        TypeError: a layer with parameters has no known bound.
    """
    bounds: dict[str, float] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in bounds)
        if not inside and next(module.parameters(recurse=False), None) is not None:
            bounds[name] = _layer_bound(name, module)
    return bounds


def lipschitz_bound(model: nn.Module) -> float:
    """Return a proved Lipschitz constant of a chain of layers in evaluation mode.

    The product of the bounds of the layers of an `nn.Sequential`, nested ones included. A module
    with a method `lipschitz_bound()` is taken at its word; of torch's own modules those that are
    known, unless a subclass has another `forward` or a hook may change the output.

    Raises:
        ValueError: a layer whose weights depend on the map has not seen an input yet.
        TypeError: a module is neither such a chain nor a layer with a known bound, or has hooks.
    """
    return _chain_bound("", model)


def _chain_bound(name: str, module: Any) -> float:
    if isinstance(module, nn.Module) and (module._forward_hooks or module._forward_pre_hooks):
        raise TypeError(
            f"model: expected layers without forward hooks, which may change their output, got "
            f"some on {type(module).__name__} at {name or 'the top'!r}"
        )
    if _is_torch(module, nn.Sequential) and not hasattr(module, "lipschitz_bound"):
        # not named_children(), which skips a layer that stands in the chain a second time
        parts = module._modules.items()
        return math.prod(_chain_bound(f"{name}.{key}".lstrip("."), m) for key, m in parts)
    if any(_is_torch(module, kind) for kind in _NONEXPANSIVE):
        return 1.0
    return _layer_bound(name, module)


def _is_torch(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module runs torch's own forward pass of this kind."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _layer_bound(name: str, module: Any) -> float:
    if hasattr(module, "lipschitz_bound"):
        return float(module.lipschitz_bound())
    linear, conv = _is_torch(module, nn.Linear), _is_torch(module, nn.Conv2d)
    if (linear or conv) and not bool(module.weight.isfinite().all()):
        raise ValueError(f"{name}.weight: expected finite values, got NaN or Inf")
    if linear:
        weight = module.weight.detach().double()
        return float(reference.schatten_bound(weight, squarings=11))
    if conv and module.groups == 1 and module.dilation == (1, 1):
        # a window of the convolution on the whole plane, or of that on a torus
        exact = module.padding_mode == "zeros" or (
            module.padding_mode == "circular"
            and all(
                2 * p <= k - 1 for p, k in zip(_padding(module), module.kernel_size, strict=True)
            )
        )
        if exact:
            return float(reference.torus_bound(module.weight.detach().double()))
    raise TypeError(
        f"model: expected layers with a known Lipschitz bound in a chain of nn.Sequential, got "
        f"{type(module).__name__} at {name or 'the top'!r}"
    )


def _padding(module: nn.Conv2d) -> tuple[int, ...]:
    if module.padding == "same":
        return tuple((k - 1) // 2 for k in module.kernel_size)
    return (0, 0) if module.padding == "valid" else tuple(module.padding)  # type: ignore[arg-type]
