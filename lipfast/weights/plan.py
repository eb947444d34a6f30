"""Which layers of a model are built alike, and the weights of such layers in one batch."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lipfast.nn.base import LipschitzModule
from lipfast.ops.context import without_autocast

MapSize = tuple[int, int]


def lipschitz_layers(model: nn.Module) -> dict[str, LipschitzModule]:
    """Return the lipfast layers of a model by their names, a shared one once."""
    modules = model.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, LipschitzModule)}


def expected_map_size(layer: LipschitzModule) -> MapSize | None:
    """Return the map size of the layer's last input, or None where it is needed and unknown.

    (1, 1) for layers whose weights do not depend on it.
    """
    return layer._last_map_size if layer._depends_on_map_size else (1, 1)


def group_key(layer: LipschitzModule, map_size: MapSize) -> Hashable | None:
    """Return what layers that one batched call can build have in common.

    None where a layer is built by itself: it has a construction of its own, a parametrised weight,
    or parameters that are no plain tensors (those of FSDP).
    """
    kind = type(layer)
    own = kind._training_weights is not LipschitzModule._training_weights
    if own or "_training_weights" in layer.__dict__ or "weight" not in layer._parameters:
        return None
    tensors = [*layer._parameters.values(), *layer._buffers.values()]
    if not all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors):
        return None
    specs = tuple(None if t is None else _spec(t) for t in tensors)
    return (kind, layer._build_options(), map_size, specs)


def _spec(tensor: Tensor) -> tuple[Hashable, ...]:
    # a frozen parameter in a stack with others would get a gradient that nobody reads
    return (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)


def groups(
    layers: Iterable[LipschitzModule], map_sizes: Iterable[MapSize]
) -> list[tuple[list[LipschitzModule], list[MapSize]]]:
    """Return layers and their map sizes in groups that `build` can build, in order of appearance.

    A layer that can only be built by itself is a group of one.
    """
    found: dict[Any, tuple[list[LipschitzModule], list[MapSize]]] = {}
    for number, (layer, map_size) in enumerate(zip(layers, map_sizes, strict=True)):
        key = group_key(layer, map_size)
        members, sizes = found.setdefault(number if key is None else key, ([], []))
        members.append(layer)
        sizes.append(map_size)
    return list(found.values())


def build(
    layers: Sequence[LipschitzModule], map_sizes: Sequence[MapSize]
) -> list[tuple[Tensor, ...]]:
    """Return the training weights of one group of layers, built in one batch.

    Layer by layer what `layer.training_weights(map_size)` returns, to rounding: at least float32
    whatever autocast says, with their graph, and with the power vectors and residuals written.

    Args:
        layers: of one group of `groups`.
        map_sizes: of each layer.

    Raises:
        ValueError: a parameter is not finite (on a CPU; elsewhere reading it would wait).
    """
    first = layers[0]
    with without_autocast(first.weight):
        for layer in layers:
            layer._check_finite(on_device=False)
        if len(layers) == 1:
            return [first._training_weights(map_sizes[0])]
        stacks = first._stacked_weights(layers, map_sizes[0])
        return list(zip(*(stack.unbind() for stack in stacks), strict=True))
