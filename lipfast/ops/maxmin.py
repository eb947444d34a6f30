"""Pairwise ordering of channels: MaxMin, or GroupSort in groups of two (Anil et al. 2019)."""

import math

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops.context import one_by_one, why_not_transformed
from lipfast.reference.maxmin import maxmin as reference_maxmin

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # csrc/maxmin.h: DType


def maxmin(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Order each pair of channels: y_2i = max(x_2i, x_2i+1), y_2i+1 = min(x_2i, x_2i+1).

    With an odd number of channels the last one passes through. A NaN in a pair makes both of its
    outputs NaN. Pairs are swapped where x_2i+1 > x_2i, so that at a tie, too, the derivative is a
    permutation (except with backend "reference"). It is saved as one bit per pair, and can be
    differentiated twice. Derivation: docs/math/maxmin.md.

    Args:
        x: (n, c, ...), float64, float32, bfloat16 or float16; n, c and the rest may be 0.
            Contiguous and channels-last memory is used as it is, other memory is copied first.
        backend: "triton", "cuda", "cpp" or "reference"; None takes the forced backend
            (`lipfast.set_backend`), or else the fastest that can run.

    Returns:
        y: (n, c, ...), dtype, device and memory format of x.

    Raises:
        TypeError: x is no tensor or has another dtype.
        ValueError: x has fewer than two dimensions, or the backend cannot run; the error says why.

    Source: Anil, Lucas, Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
    """
    _check(x)
    if why_not_transformed(x) and backend is None and backends.forced() is None:
        return _by_torch(x)
    chosen = backends.choose("maxmin", x, backend=backend)
    if chosen == "reference":
        return reference_maxmin(x)
    return torch.ops.lipfast.maxmin(x, chosen)[0]


def _check(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"maxmin: x must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        expected = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"maxmin: the dtype of x must be one of {expected}, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"maxmin: x must have the shape (n, c, ...), got {tuple(x.shape)}")


# All tensor inputs have passed _check, so a backend runs wherever its hardware and binary do.
backends.register(
    "maxmin",
    {
        "triton": backends.triton_can_run,
        "cuda": backends.cuda_can_run,
        "cpp": backends.cpp_can_run,
        "reference": lambda x: None,
    },
)


def _by_torch(x: Tensor) -> Tensor:
    """The op by operations that torch.func can transform, derivative at ties included."""
    pairs = x[:, : x.shape[1] // 2 * 2].unflatten(1, (x.shape[1] // 2, 2))
    first, second = pairs.unbind(2)
    swapped, spoiled = second > first, first.isnan() | second.isnan()
    larger, smaller = torch.where(swapped, second, first), torch.where(swapped, first, second)
    ordered = torch.stack([larger, smaller], dim=2)
    ordered = torch.where(spoiled[:, :, None], math.nan, ordered).flatten(1, 2)
    return torch.cat([ordered, x[:, -1:]], dim=1) if x.shape[1] % 2 else ordered


def _is_channels_last(x: Tensor) -> bool:
    """Whether memory holds (n, ..., c). Where there is one position, that and (n, c, ...) agree."""
    if not x.movedim(1, -1).is_contiguous():
        return False
    return math.prod(x.shape[2:]) == 1 or not x.is_contiguous()


def _to_layout(x: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _mask_bytes(x: Tensor) -> int:
    return (x.shape[0] * (x.shape[1] // 2) * math.prod(x.shape[2:]) + 7) // 8


def _forward(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    y, mask = _forward_fake(x, backend)
    channels_last = _is_channels_last(x)
    _run("maxmin_forward", _to_layout(x, channels_last), y, mask, channels_last, backend)
    return y, mask


def _backward(grad: Tensor, mask: Tensor, channels_last: bool, backend: str) -> Tensor:
    if mask.dtype != torch.uint8 or mask.shape != (_mask_bytes(grad),):
        raise ValueError(
            f"maxmin_backward: mask must hold {_mask_bytes(grad)} uint8, "
            f"got {tuple(mask.shape)} {mask.dtype}"
        )
    grad = _to_layout(grad, channels_last)
    out = torch.empty_like(grad)
    _run("maxmin_backward", grad, out, mask.contiguous(), channels_last, backend)
    return out


def _run(
    function: str, x: Tensor, y: Tensor, mask: Tensor, channels_last: bool, backend: str
) -> None:
    if x.numel() == 0:
        return
    if backend == "triton":
        from lipfast.kernels import maxmin as triton_maxmin

        getattr(triton_maxmin, function)(x, y, mask, channels_last=channels_last)
        return
    extension = backends.extension()
    params = extension.MaxMinParams(
        x=x.data_ptr(),
        y=y.data_ptr(),
        mask=mask.data_ptr(),
        batch=x.shape[0],
        channels=x.shape[1],
        spatial=math.prod(x.shape[2:]),
        channels_last=channels_last,
        dtype=_DTYPES.index(x.dtype),
    )
    if backend == "cpp":
        getattr(extension, f"{function}_cpu")(params)
        return
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        getattr(extension, f"{function}_cuda")(params, stream)


def _forward_fake(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(_to_layout(x, _is_channels_last(x)))
    return y, x.new_empty(_mask_bytes(x), dtype=torch.uint8)


def _backward_fake(grad: Tensor, mask: Tensor, channels_last: bool, backend: str) -> Tensor:
    return torch.empty_like(_to_layout(grad, channels_last))


def _save_mask(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.backend = inputs
    ctx.channels_last = _is_channels_last(x)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _save_mask_again(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, mask, ctx.channels_last, ctx.backend = inputs
    ctx.save_for_backward(mask)


# Swapping by a given mask is its own adjoint, so this is the derivative of the backward pass too.
def _swap_gradient(ctx, grad: Tensor | None) -> Tensor | None:  # type: ignore[no-untyped-def]
    if grad is None:
        return None
    (mask,) = ctx.saved_tensors
    return torch.ops.lipfast.maxmin_backward(grad, mask, ctx.channels_last, ctx.backend)


torch.library.define("lipfast::maxmin", "(Tensor x, str backend) -> (Tensor, Tensor)")
torch.library.impl("lipfast::maxmin", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::maxmin", _forward_fake)
torch.library.register_autograd(
    "lipfast::maxmin",
    lambda ctx, grad, _: (_swap_gradient(ctx, grad), None),
    setup_context=_save_mask,
)

torch.library.define(
    "lipfast::maxmin_backward",
    "(Tensor grad, Tensor mask, bool channels_last, str backend) -> Tensor",
)
torch.library.impl("lipfast::maxmin_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("lipfast::maxmin_backward", _backward_fake)
torch.library.register_autograd(
    "lipfast::maxmin_backward",
    lambda ctx, grad: (_swap_gradient(ctx, grad), None, None, None),
    setup_context=_save_mask_again,
)


# torch.compile of a vmap, and a batch of gradients, come to the registered operators -------------

for _op in ("maxmin", "maxmin_backward"):
    torch.library.register_vmap(f"lipfast::{_op}", one_by_one(getattr(torch.ops.lipfast, _op)))
