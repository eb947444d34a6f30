"""Who builds what: the shares of the ranks, and the layout of what they exchange."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.nn.base import LipschitzModule
from lipfast.nn.bcop import BCOPConv2d
from lipfast.nn.spectral import SpectralModule

_ALIGNMENT = 64  # bytes: of a cache line, and enough for every dtype
_BUCKETS = 2  # the second one is on its way while the first one's layers run
_FLAG_BYTES = _ALIGNMENT  # at the start of a segment: the first one tells whether the build failed


class Entry(NamedTuple):
    """A layer, by its number in the model's order, and the map size for which it is built."""

    layer: int
    map_size: tuple[int, int]


class Item(NamedTuple):
    """One exchanged tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Item:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Layout(NamedTuple):
    """What the owner of a layer sends: its training weights and, behind them, its buffers."""

    weights: tuple[Item, ...]
    buffers: tuple[Item, ...]

    @classmethod
    def of(cls, weights: Iterable[Tensor], buffers: Iterable[Tensor]) -> Layout:
        return cls(tuple(map(Item.of, weights)), tuple(map(Item.of, buffers)))


class Bucket(NamedTuple):
    """Entries that are exchanged together, with their owners and layouts."""

    entries: tuple[Entry, ...]
    owners: tuple[int, ...]
    layouts: tuple[Layout, ...]

    def offsets(self, ranks: int) -> tuple[list[list[int]], int]:
        """Byte offsets of every entry's items in its owner's segment; bytes of a segment."""
        used = [_FLAG_BYTES] * ranks
        offsets = []
        for owner, layout in zip(self.owners, self.layouts, strict=True):
            places = []
            for item in (*layout.weights, *layout.buffers):
                places.append(used[owner])
                used[owner] += -(-item.n_bytes // _ALIGNMENT) * _ALIGNMENT
            offsets.append(places)
        return offsets, max(used)

    def dtypes(self) -> list[torch.dtype]:
        """Of the weights that have gradients."""
        items = (item for layout in self.layouts for item in layout.weights)
        return list(dict.fromkeys(item.dtype for item in items if item.differentiable))


class Plan:
    """Which rank builds which layers, for one choice of layers and map sizes.

    The layouts are known once every rank has built its share for the first time.
    """

    def __init__(
        self, entries: Sequence[Entry], layers: Sequence[LipschitzModule], ranks: int
    ) -> None:
        self.entries = tuple(entries)
        costs = [construction_cost(layers[e.layer], e.map_size) for e in entries]
        self.owners = assign(costs, ranks)
        self._ranges = split(costs, _BUCKETS)
        self._owner_of = {e.layer: o for e, o in zip(entries, self.owners, strict=True)}
        self.buckets: list[Bucket] = []
        self.fingerprint = 0

    def owner(self, entry: Entry) -> int:
        return self._owner_of[entry.layer]

    def set_layouts(self, layouts: dict[int, Layout]) -> None:
        self.buckets = [
            Bucket(
                tuple(self.entries[i] for i in numbers),
                tuple(self.owners[i] for i in numbers),
                tuple(layouts[self.entries[i].layer] for i in numbers),
            )
            for numbers in self._ranges
        ]


def construction_cost(layer: LipschitzModule, map_size: tuple[int, int]) -> int:
    """Return about how many multiplications the layer's training weights take.

    Known from shapes alone, up to a factor that the layers of one method share.
    """
    shape = layer.weight.shape
    taps = math.prod(layer.kernel_size)
    rows, columns = layer.out_channels, layer._inner_channels
    if isinstance(layer, SpectralModule) and layer._depends_on_map_size:
        h, w = layer._grid(map_size)
        return 4 * h * (w // 2 + 1) * rows * columns * min(rows, columns)
    power_vector = getattr(layer, "power_vector", None)
    if isinstance(layer, BCOPConv2d):
        return layer.weight.numel() * shape[-1]
    if isinstance(power_vector, Tensor):  # one application of the layer's operator to the vector
        return power_vector.numel() * shape[0] * (taps if layer._depends_on_map_size else 1)
    return layer.weight.numel() * min(shape[:2]) * taps


def assign(costs: Sequence[int], ranks: int) -> list[int]:
    """Give every cost, the largest first, to the rank with the least so far; ties by number."""
    owners, loads = [0] * len(costs), [0] * ranks
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        owners[number] = rank
        loads[rank] += costs[number]
    return owners


def split(costs: Sequence[int], parts: int) -> list[range]:
    """Cut the numbers of the costs, in order, into at most `parts` ranges of about equal cost."""
    total, cuts, done = sum(costs), [0], 0
    for number, cost in enumerate(costs):
        if len(cuts) < parts and number > cuts[-1] and done * parts >= total * len(cuts):
            cuts.append(number)
        done += cost
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(costs)], strict=True)]
