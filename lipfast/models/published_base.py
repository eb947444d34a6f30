"""What one published layer stores."""

from typing import NamedTuple

from torch import Tensor

from lipfast.nn import LipschitzModule

State = dict[str, Tensor]


class Place(NamedTuple):
    """Where a layer stands in the published network: its name there, and the side of its map."""

    name: str
    map_size: int


class Layout:
    """The tensors of a published layer and of ours, as float64 on the CPU.

    Attributes:
        optional: keys that the published layer has only after a forward pass.
    """

    optional: tuple[str, ...] = ()

    def shapes(self, layer: LipschitzModule, place: Place) -> dict[str, tuple[int, ...]]:
        """Return the shape of each key of the published layer."""
        raise NotImplementedError

    def ours(self, found: State, layer: LipschitzModule, place: Place) -> State:
        """Return tensors of our layer, by name, from those of the published one."""
        raise NotImplementedError

    def published(self, own: State, layer: LipschitzModule, place: Place) -> State:
        """Return all tensors of the published layer from those of ours."""
        raise NotImplementedError

    def finish(self, layer: LipschitzModule) -> None:
        """Bring buffers that are not in the published layer up to date."""
