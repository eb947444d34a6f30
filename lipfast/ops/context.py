"""What the ops ask of their surroundings: autocast, torch.func, the dispatcher."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

from lipfast.transforms import (
    inside_transforms,
    is_transformed,
    why_not_transformed,
    without_tangents,
)

__all__ = [
    "autocast_dtype",
    "by_torch",
    "inside_transforms",
    "is_autocast",
    "is_plain",
    "is_traced",
    "is_transformed",
    "one_by_one",
    "outside_transforms",
    "torch_gradients",
    "why_not_transformed",
    "without_autocast",
    "without_tangents",
]


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
    if torch.compiler.is_compiling() or inside_transforms():
        return False
    return all(type(x) in kinds for x in tensors)


def is_traced(x: Tensor) -> bool:
    """Whether x has no values now: torch.compile, export, torch.func or FakeTensorMode."""
    return (
        torch.compiler.is_compiling()
        or isinstance(x, FakeTensor)
        or x.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def outside_transforms(*tensors: Tensor) -> AbstractContextManager[Any]:
    """Leave the transforms of torch.func, unless they act on one of the tensors."""
    if not torch._C._are_functorch_transforms_active() or any(is_traced(x) for x in tensors):
        return nullcontext()
    return temporarily_clear_interpreter_stack()


def by_torch(grad: Tensor | None) -> bool:
    """Whether a backward pass must be made of torch's operations, with rules for everything.

    Under `create_graph=True`, and for a batch of gradients (`is_grads_batched`).
    """
    if torch.is_grad_enabled() or is_transformed(grad):
        return True
    batched = torch._C._functorch.is_legacy_batchedtensor  # of is_grads_batched
    return grad is not None and not torch.compiler.is_compiling() and batched(grad)


def one_by_one(op: Any) -> Any:
    """Return the rule of torch.func.vmap that runs `op` for each index: for `register_vmap`."""

    def batched(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def at(i: int) -> tuple[Any, ...]:
            pairs = zip(arguments, in_dims, strict=True)
            return tuple(a if dim is None else a.select(dim, i) for a, dim in pairs)

        results = [op(*at(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        parts = tuple(torch.stack(part) for part in zip(*results, strict=True))
        return parts, (0,) * len(parts)

    return batched


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
