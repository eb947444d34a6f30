"""Counts what a function asks of the machine: FLOPs, launches, waits for the GPU, saved bytes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lipfast.saved import saved_tensors, storage_bytes

aten = torch.ops.aten

# They make no kernel run.
_ONLY_MEMORY = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.set_,
    aten.lift_fresh,
}
# The host waits for their result.
_WAITS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.linalg_eigvalsh,
}
# One kernel on a GPU, or, the last one, as many steps as the numbers ask for.
_WHOLE = {"lipfast::maxmin", "lipfast::maxmin_backward", "lipfast::conv_norm_map_bound"}


class Launches(TorchDispatchMode):
    """Counts operations that run a kernel, those inside lipfast's operators one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func.namespace == "lipfast" and func.name() not in _WHOLE:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        if packet not in flop_registry:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self.waits += packet in _WAITS
        self.launches += not (func.is_view or packet in _ONLY_MEMORY)
        return func(*args, **kwargs)


def _inverse_flops(matrix: Tensor, **_: Any) -> int:
    return 2 * matrix.numel() * matrix.shape[-1]


def _real_flops(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula on tensors that counts the real operations of complex products."""

    def flops(*args: Any, **kwargs: Any) -> int:
        is_complex = any(isinstance(a, Tensor) and a.is_complex() for a in args)
        return (4 if is_complex else 1) * formula(*args, **kwargs)

    flops._get_raw = True  # type: ignore[attr-defined]
    return flops


_FORMULAS = {
    packet: _real_flops(formula)
    for packet, formula in {**flop_registry, aten.linalg_inv_ex: _inverse_flops}.items()
}


def count(function: Callable[[], object]) -> dict[str, int]:
    """Return the FLOPs, the launches and the waits of a call.

    FLOPs are those of products, convolutions and inverses.
    """
    with (
        FlopCounterMode(display=False, custom_mapping=_FORMULAS) as flops,
        Launches() as seen,
    ):
        function()
    counts = {"flops": flops.get_total_flops(), "launches": seen.launches}
    return {**counts, "waits": seen.waits}


def count_step(forward: Callable[[], Any], known: Iterable[Tensor]) -> dict[str, int]:
    """Return the counts of a forward and backward pass, and the bytes saved in between.

    Args:
        forward: returns a tensor or a tuple of them.
        known: inputs and parameters, whose storages are there without it.
    """
    known = list(known)
    saved: list[Tensor] = []

    def step() -> None:
        with saved_tensors() as kept:
            y = forward()
        saved.extend(kept)
        outputs = [t for t in ((y,) if isinstance(y, Tensor) else y) if t.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])

    counts = count(step)
    for tensor in known:
        tensor.grad = None
    return {**counts, "saved_bytes": storage_bytes(saved, *known)}
