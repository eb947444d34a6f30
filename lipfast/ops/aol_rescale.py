"""A kernel scaled by r^(-1/2) along its input channels (Prach and Lampert 2022)."""

import functools
import math

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import aol_rescale_extension, aol_rescale_torch
from lipfast.ops.context import by_torch, is_plain, torch_gradients
from lipfast.reference.gram_bound import inverse_or_zero

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def aol_rescale(
    weight: Tensor,
    r: Tensor,
    *,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Return weight_oi r_i^(-1/2), and 0 where r_i is not positive.

    Scaling, cast and change of memory format are one pass over the kernel, and so is the
    derivative with respect to weight and r; under `create_graph=True` that is torch's derivative of
    the reference. Two calls give the same bits. Derivation: docs/math/gram_bound.md.

    Args:
        weight: (out, in / groups, kh, kw) or (out, in / groups), or several in (batch, ...);
            float64 or float32.
        r: (in,), or (batch, in); dtype of weight.
        groups: of the convolution.
        dtype: of the result, float64, float32, bfloat16 or float16; that of weight by default.
        channels_last: whether memory holds (out, kh, kw, in / groups).
        backend: "triton" (float32), "cuda", "cpp" (no float16), "torch" or "reference"; None takes
            the forced backend (`lipfast.set_backend`), or else the fastest that can run.

    Returns:
        The scaled kernel, shape and device of weight.

    Raises:
        TypeError: weight or r is no tensor, or a dtype is another one.
        ValueError: a shape, device or number of groups does not fit, or the backend cannot run;
            the error says why.

    Source: Prach, Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz
    networks", ECCV 2022, theorem 2.
    """
    dtype = _check(weight, r, groups, dtype)
    chosen = backends.choose("aol_rescale", weight, dtype, r, backend=backend)
    if chosen == "reference":
        return _published(weight, r, groups, dtype, channels_last)
    if is_plain(weight) and chosen in ("cpp", "torch"):
        # A small kernel would spend more time in the registered op's dispatch than on its numbers.
        return _Eager.apply(weight, r, groups, dtype, channels_last, chosen)
    return torch.ops.lipfast.aol_rescale(weight, r, groups, dtype, channels_last, chosen)


def _check(weight: Tensor, r: Tensor, groups: int, dtype: torch.dtype | None) -> torch.dtype:
    for name, tensor in (("weight", weight), ("r", r)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"aol_rescale: {name} must be a torch.Tensor, got {type(tensor).__name__}"
            )
    if weight.dtype not in _DTYPES[:2]:
        raise TypeError(
            "aol_rescale: the dtype of weight must be torch.float64 or torch.float32, "
            f"got {weight.dtype}"
        )
    if r.dtype != weight.dtype:
        raise TypeError(
            f"aol_rescale: r must have the dtype {weight.dtype} of weight, got {r.dtype}"
        )
    if dtype is not None and dtype not in _DTYPES:
        expected = ", ".join(str(known) for known in _DTYPES)
        raise TypeError(f"aol_rescale: dtype must be one of {expected}, got {dtype}")
    if not 2 <= weight.dim() <= 5:
        raise ValueError(
            "aol_rescale: weight must have the shape (out, in) or (out, in, kh, kw), with or "
            f"without a batch dimension before it, got {tuple(weight.shape)}"
        )
    first = weight.dim() % 2
    if not isinstance(groups, int) or groups < 1 or weight.shape[first] % groups:
        raise ValueError(
            f"aol_rescale: groups must divide the {weight.shape[first]} output channels, "
            f"got {groups!r}"
        )
    shape = (*weight.shape[:first], weight.shape[first + 1] * groups)
    if r.shape != shape:
        raise ValueError(f"aol_rescale: r must have the shape {shape}, got {tuple(r.shape)}")
    if r.device != weight.device:
        raise ValueError(
            f"aol_rescale: r must be on the device {weight.device} of weight, got {r.device}"
        )
    return weight.dtype if dtype is None else dtype


def _triton_can_run(weight: Tensor, dtype: torch.dtype, *_: Tensor) -> str | None:
    if weight.dtype == torch.float64:
        return "it computes in float32, and weight has float64"
    return backends.triton_can_run(weight)


def _cpp_can_run(weight: Tensor, dtype: torch.dtype, *_: Tensor) -> str | None:
    if dtype == torch.float16:
        return "it has no float16"
    return backends.cpp_can_run(weight)


backends.register(
    "aol_rescale",
    {
        "triton": _triton_can_run,
        "cuda": backends.cuda_can_run,
        "cpp": _cpp_can_run,
        "torch": lambda *_: None,
        "reference": lambda *_: None,
    },
)


def _published(
    weight: Tensor, r: Tensor, groups: int, dtype: torch.dtype, channels_last: bool
) -> Tensor:
    first = weight.dim() % 2
    factors = inverse_or_zero(r, power=0.5).unflatten(first, (groups, 1, -1))
    factors = factors.view(factors.shape + (1,) * (weight.dim() - first - 2))
    scaled = (weight.unflatten(first, (groups, -1)) * factors).flatten(first, first + 1).to(dtype)
    if channels_last and scaled.dim() >= 4:
        return scaled.movedim(-3, -1).contiguous().movedim(-1, -3)
    return scaled


def _blocks(tensor: Tensor, groups: int) -> Tensor:
    """(batch groups, out / groups, in / groups, taps): a view where memory allows."""
    first = tensor.dim() % 2
    rows, columns, *taps = tensor.shape[first:]
    batch = math.prod(tensor.shape[:first])
    return tensor.reshape(batch * groups, rows // groups, columns, math.prod(taps))


def _launcher(backend: str):  # type: ignore[no-untyped-def]
    if backend == "triton":
        from lipfast.kernels import aol_rescale as triton_aol_rescale

        return triton_aol_rescale
    return aol_rescale_torch


def _forward(
    weight: Tensor, r: Tensor, groups: int, dtype: torch.dtype, channels_last: bool, backend: str
) -> Tensor:
    out = _forward_fake(weight, r, groups, dtype, channels_last, backend)
    if out.numel() == 0:
        return out
    weight, r = weight.contiguous(), r.contiguous()
    if backend in ("cpp", "cuda"):
        turned = channels_last and weight.dim() >= 4
        aol_rescale_extension.aol_rescale_forward(weight, r, out, groups, channels_last=turned)
    else:
        kernels, target = _blocks(weight, groups), _blocks(out, groups)
        _launcher(backend).aol_rescale_forward(kernels, r.view(len(kernels), -1), target)
    return out


def _backward(
    grad: Tensor, weight: Tensor, r: Tensor, groups: int, backend: str
) -> tuple[Tensor, Tensor]:
    grad_weight, grad_r = _backward_fake(grad, weight, r, groups, backend)
    if weight.numel() == 0:
        return grad_weight, grad_r.zero_()
    weight, r = weight.contiguous(), r.contiguous()
    if backend in ("cpp", "cuda"):
        aol_rescale_extension.aol_rescale_backward(grad, weight, r, grad_weight, grad_r, groups)
        return grad_weight, grad_r
    kernels, out = _blocks(weight, groups), _blocks(grad_weight, groups)
    rows = r.view(len(kernels), -1)
    sums = _launcher(backend).aol_rescale_backward(_blocks(grad, groups), kernels, rows, out)
    return grad_weight, torch.where(rows > 0, sums / (-2 * rows), 0).view(r.shape)


def _forward_fake(
    weight: Tensor, r: Tensor, groups: int, dtype: torch.dtype, channels_last: bool, backend: str
) -> Tensor:
    if not channels_last or weight.dim() < 4:
        return weight.new_empty(weight.shape, dtype=dtype)
    *first, channels, kh, kw = weight.shape
    return weight.new_empty((*first, kh, kw, channels), dtype=dtype).movedim(-1, -3)


def _backward_fake(
    grad: Tensor, weight: Tensor, r: Tensor, groups: int, backend: str
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), r.new_empty(r.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, r, ctx.groups, ctx.dtype, _, ctx.backend = inputs
    ctx.save_for_backward(weight, r)


def _gradient(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    if by_torch(grad):
        function = functools.partial(
            _published, groups=ctx.groups, dtype=ctx.dtype, channels_last=False
        )
        return *torch_gradients(function, ctx.saved_tensors, grad), None, None, None, None
    op = torch.ops.lipfast.aol_rescale_backward
    grad_weight, grad_r = op(grad, *ctx.saved_tensors, ctx.groups, ctx.backend)
    return grad_weight, grad_r, None, None, None, None


class _Eager(torch.autograd.Function):
    """The op without a dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        _save(ctx, inputs, None)
        return _forward(*inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if by_torch(grad):
            return _gradient(ctx, grad)
        weight, r = ctx.saved_tensors
        return *_backward(grad, weight, r, ctx.groups, ctx.backend), None, None, None, None


torch.library.define(
    "lipfast::aol_rescale",
    "(Tensor weight, Tensor r, int groups, ScalarType dtype, bool channels_last, str backend)"
    " -> Tensor",
)
torch.library.impl("lipfast::aol_rescale", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::aol_rescale", _forward_fake)
torch.library.register_autograd("lipfast::aol_rescale", _gradient, setup_context=_save)

torch.library.define(
    "lipfast::aol_rescale_backward",
    "(Tensor grad, Tensor weight, Tensor r, int groups, str backend) -> (Tensor, Tensor)",
)
torch.library.impl("lipfast::aol_rescale_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("lipfast::aol_rescale_backward", _backward_fake)
