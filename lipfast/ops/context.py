"""What the ops ask of their surroundings: autocast, torch.func, the dispatcher."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of `x`, where that device has it (meta has not)."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives the convolutions of `x`, or None."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_plain(*tensors: Tensor) -> bool:
    """Whether an op may go without the dispatcher, a tenth of the time of a small layer."""
    kinds = (Tensor, torch.nn.Parameter)
    return not torch.compiler.is_compiling() and all(type(x) in kinds for x in tensors)


def is_transformed(x: Tensor | None) -> bool:
    """Whether a transform of torch.func acts on x, outside of torch.compile."""
    if x is None or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def why_not_transformed(*tensors: Tensor | None) -> str | None:
    """Return why operators without a rule for torch.func cannot run on the tensors, or None."""
    if any(is_transformed(x) for x in tensors):
        return "the transforms of torch.func need the backend 'reference'"
    return None


def no_second_derivative(op: str) -> Callable[..., NoReturn]:
    """Return the derivative to register for the backward operator of `op`: an error."""

    def derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            f"{op}: its derivative cannot be differentiated; backend='reference' can be"
        )

    return derivative
