"""Whether torch.func or forward-mode differentiation is at work, outside of torch.compile."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(x: Tensor | None) -> bool:
    """Whether a transform of torch.func acts on x, or x carries a tangent."""
    if x is None or torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or _is_dual(x)


def inside_transforms() -> bool:
    """Whether a transform of torch.func is under way, where no buffer may be written."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def why_not_transformed(*arguments: Any) -> str | None:
    """Return why operators without a rule for torch.func cannot run on the arguments, or None."""
    if inside_transforms() or any(isinstance(x, Tensor) and is_transformed(x) for x in arguments):
        return (
            "the transforms of torch.func and forward-mode differentiation need the backend "
            "'reference'"
        )
    return None


def without_tangents() -> AbstractContextManager[Any]:
    """What `torch.no_grad()` is to backward-mode differentiation, for the forward mode."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return nullcontext()
    return forward_ad._set_fwd_grad_enabled(False)


def _is_dual(x: Tensor) -> bool:
    # without an open level, nearly always, there is nothing to look up
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
