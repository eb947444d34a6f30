"""Memory that one training step needs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .loss import margin_cross_entropy


def saved_for_backward_bytes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes of the tensors that one training step keeps for its backward pass.

    The forward pass and the loss run in training mode on a copy of the model, which leaves the
    model's buffers as they are. Every storage counts once, the batch itself included; parameters
    are excluded. It is the activation memory of the step, without temporary buffers, gradients and
    optimizer state, and does not depend on the allocator: a measure for a CPU, where torch has no
    peak counter. On a GPU `torch.cuda.max_memory_allocated` is the better one.

    Args:
        model: a classifier.
        x: shape (b, c, h, w), on the model's device.
        y: int64, shape (b,).
    """
    model = copy.deepcopy(model).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = margin_cross_entropy(model(x), y)
    del loss  # until here its graph kept the storages alive, so that no address was used twice
    return sum(sizes.values())
