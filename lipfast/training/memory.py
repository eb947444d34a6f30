"""Memory that one training step needs."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from lipfast.saved import saved_bytes

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
    return saved_bytes(lambda: margin_cross_entropy(model(x), y), *model.parameters())
