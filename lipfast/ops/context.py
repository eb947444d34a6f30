"""What the ops ask of their surroundings: autocast, torch.func, the dispatcher."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of `x`, where that device has it (meta has not)."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives the convolutions of `x`, or None."""
    if x.dtype == torch.float64 or not is_autocast(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def is_plain(*tensors: Tensor) -> bool:
    """Whether an op may go without the dispatcher, a tenth of the time of a small layer."""
    kinds = (Tensor, torch.nn.Parameter)
    return not torch.compiler.is_compiling() and all(type(x) in kinds for x in tensors)


def is_transformed(x: Tensor | None) -> bool:
    """Whether a transform of torch.func acts on x, outside of torch.compile."""
    if x is None or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def inside_transforms() -> bool:
    """Whether a transform of torch.func is under way, where no buffer may be written."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_traced(x: Tensor) -> bool:
    """Whether x has no values now: torch.compile, export, torch.func or FakeTensorMode."""
    return (
        torch.compiler.is_compiling()
        or isinstance(x, FakeTensor)
        or x.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def outside_transforms(x: Tensor) -> AbstractContextManager[Any]:
    """Leave the transforms of torch.func, unless they act on x."""
    if is_traced(x) or not torch._C._are_functorch_transforms_active():
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def why_not_transformed(*tensors: Tensor | None) -> str | None:
    """Return why operators without a rule for torch.func cannot run on the tensors, or None."""
    if any(is_transformed(x) for x in tensors):
        return "the transforms of torch.func need the backend 'reference'"
    return None


def torch_gradients(
    function: Callable[..., Tensor], tensors: tuple[Tensor | None, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return dL/dtensor of each tensor by torch's derivative of `function`, differentiable again.

    For the backward pass of an op under `create_graph=True`: `function` is the op in plain torch
    operations, `grad` is dL/dfunction(*tensors). None for tensors that require no gradient.
    """
    with torch.enable_grad():
        # one tensor may have been computed from another: a gradient must not flow on to that
        aliases = [None if t is None else t.view_as(t) for t in tensors]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        y = function(*aliases)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in aliases)
