"""What a forward pass keeps for its backward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Collect the tensors that are saved for backward inside the context, in their order."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def saved_bytes(function: Callable[[], object], *known: Tensor) -> int:
    """Bytes of the storages that `function` saves for backward, without those of `known`."""
    with saved_tensors() as saved:
        function()
    return storage_bytes(saved, *known)


def storage_bytes(tensors: Iterable[Tensor], *known: Tensor) -> int:
    """Bytes of the storages of `tensors`, each once, without those of `known`."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    sizes = {storage._cdata: storage.nbytes() for storage in storages}  # fake ones have no pointer
    for tensor in known:
        sizes.pop(tensor.untyped_storage()._cdata, None)
    return sum(sizes.values())
