"""Row sums of a convolution's Gram operator (Prach and Lampert 2022; Araujo et al. 2023)."""

import functools
import math

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import gram_bound_cpp, gram_bound_cuda, gram_bound_gemm
from lipfast.ops.context import by_torch, is_plain, torch_gradients, without_autocast
from lipfast.reference.gram_bound import gram_bound as reference_gram_bound

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gram_bound(
    weight: Tensor,
    q: Tensor | None = None,
    *,
    axis: str = "in",
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Return r_i = sum_j sum_delta |G_delta|_ij q_j / q_i, G the self-correlation of `weight`.

    For any q > 0, diag(r) - G is positive semi-definite, so that a convolution with `weight`
    scaled by r^(-1/2) along `axis` has spectral norm at most 1. The derivative with respect to
    weight and q takes the signs of G as constants, and 0 where G is 0; it needs one byte per offset
    and pair of channels; under `create_graph=True` it is torch's derivative of the reference.
    Products follow torch's setting for TF32 in float32 matrix products on CUDA. Two calls give the
    same bits. Derivation and rounding: docs/math/gram_bound.md.

    Args:
        weight: (out, in / groups, kh, kw) or (out, in / groups), or several in (batch, ...);
            float64 and float32, or bfloat16 and float16, which are computed in float32.
        q: positive weights, of the shape and dtype of the result; None for ones.
        axis: "in" correlates the input channels (AOL), "out" the output channels (SLL).
        groups: of the convolution; channels of different groups do not meet.
        backend: "triton" (float32), "cuda", "cpp", "torch" or "reference"; None takes the forced
            backend (`lipfast.set_backend`), or else the fastest that can run.

    Returns:
        r, (in,) or (out,), or (batch, in) or (batch, out); dtype and device of weight.

    Raises:
        TypeError: weight or q is no tensor or has another dtype.
        ValueError: a shape, device, axis or number of groups does not fit, or the backend cannot
            run; the error says why.

    Source: Prach, Lampert, "Almost-orthogonal layers for efficient general-purpose Lipschitz
    networks", ECCV 2022, theorem 2; Araujo et al., ICLR 2023, theorem 3.
    """
    _check(weight, q, axis, groups)
    chosen = backends.choose("gram_bound", weight, q, backend=backend)
    dtype = weight.dtype
    if dtype.itemsize < 4:
        weight, q = weight.float(), None if q is None else q.float()
    if chosen == "reference":
        return _published(weight, q, axis, groups).to(dtype)
    if is_plain(weight) and chosen in ("cpp", "torch"):
        # A small kernel would spend more time in the registered op's dispatch than in its products.
        return _Eager.apply(weight, q, axis, groups, chosen).to(dtype)
    return torch.ops.lipfast.gram_bound(weight, q, axis, groups, chosen)[0].to(dtype)


def _check(weight: Tensor, q: Tensor | None, axis: str, groups: int) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"gram_bound: weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dtype not in _DTYPES:
        expected = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(
            f"gram_bound: the dtype of weight must be one of {expected}, got {weight.dtype}"
        )
    if not 2 <= weight.dim() <= 5:
        raise ValueError(
            "gram_bound: weight must have the shape (out, in) or (out, in, kh, kw), with or "
            f"without a batch dimension before it, got {tuple(weight.shape)}"
        )
    if weight.dim() >= 4 and 0 in weight.shape[-2:]:
        raise ValueError(f"gram_bound: weight has no taps, its shape is {tuple(weight.shape)}")
    if axis not in ("in", "out"):
        raise ValueError(f"gram_bound: axis must be 'in' or 'out', got {axis!r}")
    out_channels = weight.shape[weight.dim() % 2]
    if not isinstance(groups, int) or groups < 1 or out_channels % groups:
        raise ValueError(
            f"gram_bound: groups must divide the {out_channels} output channels, got {groups!r}"
        )
    if q is None:
        return
    if not isinstance(q, Tensor):
        raise TypeError(f"gram_bound: q must be a torch.Tensor or None, got {type(q).__name__}")
    if q.dtype != weight.dtype:
        raise TypeError(
            f"gram_bound: q must have the dtype {weight.dtype} of weight, got {q.dtype}"
        )
    if q.device != weight.device:
        raise ValueError(
            f"gram_bound: q must be on the device {weight.device} of weight, got {q.device}"
        )
    if q.shape != _result_shape(weight, axis, groups):
        raise ValueError(
            f"gram_bound: q must have the shape {_result_shape(weight, axis, groups)} of the "
            f"result, got {tuple(q.shape)}"
        )


def _triton_can_run(weight: Tensor, *_: Tensor | None) -> str | None:
    if weight.dtype == torch.float64:
        return "it computes in float32, and weight has float64"
    return backends.triton_can_run(weight)


backends.register(
    "gram_bound",
    {
        "triton": _triton_can_run,
        "cuda": backends.cuda_can_run,
        "cpp": backends.cpp_can_run,
        "torch": lambda *_: None,
        "reference": lambda *_: None,
    },
)


def _result_shape(weight: Tensor, axis: str, groups: int) -> tuple[int, ...]:
    first = weight.dim() % 2
    channels = weight.shape[first] if axis == "out" else weight.shape[first + 1] * groups
    return (*weight.shape[:first], channels)


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """View of (batch groups, out / groups, in / groups, kh, kw)."""
    first = weight.dim() % 2
    batch = math.prod(weight.shape[:first])
    rows, columns, *taps = weight.shape[first:]
    return weight.reshape(batch * groups, rows // groups, columns, *(taps or (1, 1)))


def _taps(weight: Tensor, axis: str, groups: int) -> Tensor:
    """View of (batch groups, kh, kw, c, n): channels to correlate, channels to sum over."""
    order = (0, 3, 4, 2, 1) if axis == "in" else (0, 3, 4, 1, 2)
    return _grouped(weight, groups).permute(order)


def _published(weight: Tensor, q: Tensor | None, axis: str, groups: int) -> Tensor:
    kernels = _grouped(weight, groups)
    if len(kernels) == 0:
        return weight.new_empty(_result_shape(weight, axis, groups))
    weights = [None] * len(kernels) if q is None else q.reshape(len(kernels), -1)
    pairs = zip(kernels, weights, strict=True)
    rows = [reference_gram_bound(kernel, one, axis=axis) for kernel, one in pairs]
    return torch.stack(rows).view(_result_shape(weight, axis, groups))


def _forward(
    weight: Tensor, q: Tensor | None, axis: str, groups: int, backend: str
) -> tuple[Tensor, Tensor]:
    taps = _taps(weight, axis, groups)
    if weight.numel() == 0:
        r, signs = _forward_fake(weight, q, axis, groups, backend)
        return r.zero_(), signs.zero_()
    rows = None if q is None else q.reshape(len(taps), -1).contiguous()
    with without_autocast(weight):
        if backend == "torch":
            sums, signs = gram_bound_gemm.gram_bound_forward(taps, rows)
        else:
            signs = _empty_signs(taps)
            scale = taps.new_ones(taps.shape[0], taps.shape[3]) if rows is None else rows
            sums = _launcher(backend).gram_bound_forward(taps, scale, signs) / scale
    return sums.view(_result_shape(weight, axis, groups)), signs


def _backward(
    grad: Tensor,
    weight: Tensor,
    q: Tensor | None,
    r: Tensor,
    signs: Tensor,
    axis: str,
    groups: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_weight, grad_q = _backward_fake(grad, weight, q, r, signs, axis, groups, backend)
    if weight.numel() == 0:
        return grad_weight.zero_(), grad_q.zero_()
    taps, grad_taps = _taps(weight, axis, groups), _taps(grad_weight, axis, groups)
    grad, r = grad.reshape(len(taps), -1), r.reshape(len(taps), -1)
    rows = None if q is None else q.reshape(len(taps), -1).contiguous()
    a = grad if rows is None else grad / rows
    with without_autocast(weight):
        if backend == "torch":
            gram_bound_gemm.gram_bound_backward(taps, signs, a, rows, grad_taps)
        else:
            scale = torch.ones_like(a) if rows is None else rows
            numbers = (signs.contiguous(), a.contiguous(), scale.contiguous())
            _launcher(backend).gram_bound_backward(taps, *numbers, grad_taps)
    if q is None or rows is None:
        return grad_weight, grad_q
    # <taps_i, dL/dtaps_i> = a_i q_i r_i + q_i sum_j N_ij a_j, since r is homogeneous in the taps.
    inner = (taps * grad_taps).sum(dim=(1, 2, 4))
    return grad_weight, ((inner - 2 * grad * r) / rows).view(q.shape)


def _launcher(backend: str):  # type: ignore[no-untyped-def]
    if backend == "triton":
        from lipfast.kernels import gram_bound as triton_gram_bound

        return triton_gram_bound
    return gram_bound_cpp if backend == "cpp" else gram_bound_cuda


def _forward_fake(
    weight: Tensor, q: Tensor | None, axis: str, groups: int, backend: str
) -> tuple[Tensor, Tensor]:
    signs = _empty_signs(_taps(weight, axis, groups))
    return weight.new_empty(_result_shape(weight, axis, groups)), signs


def _empty_signs(taps: Tensor) -> Tensor:
    size = (taps.shape[0], taps.shape[3], gram_bound_gemm.offsets(taps), taps.shape[3])
    return taps.new_empty(size, dtype=torch.int8)


def _backward_fake(
    grad: Tensor,
    weight: Tensor,
    q: Tensor | None,
    r: Tensor,
    signs: Tensor,
    axis: str,
    groups: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return grad_weight, weight.new_empty(0 if q is None else q.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, q, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, q, *output)


def _gradient(ctx, grad: Tensor | None, _: None):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None, None
    weight, q, r, signs = ctx.saved_tensors
    if by_torch(grad):
        return *_differentiable(grad, weight, q, *ctx.options), None, None, None
    op = torch.ops.lipfast.gram_bound_backward
    grad_weight, grad_q = op(grad, weight, q, r, signs, *ctx.options)
    return grad_weight, None if q is None else grad_q, None, None, None


def _differentiable(
    grad: Tensor, weight: Tensor, q: Tensor | None, axis: str, groups: int, _: str
) -> tuple[Tensor | None, ...]:
    function = functools.partial(_published, axis=axis, groups=groups)
    with without_autocast(weight):
        return torch_gradients(function, (weight, q), grad)


class _Eager(torch.autograd.Function):
    """The op without a dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
        r, signs = _forward(*inputs)
        weight, q, *ctx.options = inputs
        ctx.save_for_backward(weight, q, r, signs)
        return r

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        weight, q, r, signs = ctx.saved_tensors
        if by_torch(grad):
            return *_differentiable(grad, weight, q, *ctx.options), None, None, None
        grad_weight, grad_q = _backward(grad, weight, q, r, signs, *ctx.options)
        return grad_weight, grad_q if ctx.needs_input_grad[1] else None, None, None, None


torch.library.define(
    "lipfast::gram_bound",
    "(Tensor weight, Tensor? q, str axis, int groups, str backend) -> (Tensor, Tensor)",
)
torch.library.impl("lipfast::gram_bound", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::gram_bound", _forward_fake)
torch.library.register_autograd("lipfast::gram_bound", _gradient, setup_context=_save)

torch.library.define(
    "lipfast::gram_bound_backward",
    "(Tensor grad, Tensor weight, Tensor? q, Tensor r, Tensor signs, str axis, int groups, "
    "str backend) -> (Tensor, Tensor)",
)
torch.library.impl("lipfast::gram_bound_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("lipfast::gram_bound_backward", _backward_fake)
