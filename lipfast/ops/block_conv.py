"""Orthogonal convolution kernels from half the columns of orthogonal matrices (BCOP)."""

import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops.context import without_autocast
from lipfast.reference import block_conv as published

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def block_conv(
    factor: Tensor,  # (out, c)
    halves: Tensor,  # (2 (k - 1), c, r)
    *,
    backend: str | None = None,
) -> Tensor:
    """Return the k x k kernel of H and 2 (k - 1) projectors P = Q Q^T in turn vertical, horizontal.

    K <- K P at the first taps of an axis plus K - K P at the next ones, which composes K with the
    2x1 or 1x2 kernel [P, I - P] (BCOP, algorithm 1): an orthogonal convolution where H has
    orthonormal rows and each Q orthonormal columns, and of norm at most 1 where their singular
    values are at most 1. P is never formed. Differentiable any number of times; the backward pass
    keeps the two arguments and builds the kernel again. Derivation: docs/math/block_conv.md.

    Args:
        factor: H, (out, c), or several in (batch, out, c); float64 and float32, or bfloat16 and
            float16, which are computed in float32.
        halves: the Q, (2 (k - 1), c, r) or (batch, 2 (k - 1), c, r); dtype and device of factor.
        backend: "torch", or "reference", which forms each P and keeps every intermediate kernel;
            None takes the forced backend (`lipfast.set_backend`), or else "torch".

    Returns:
        (out, c, k, k) or (batch, out, c, k, k); dtype and device of factor.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: a shape or device does not fit, or the backend cannot run.

    Source: Li, Haque, Anil, Lucas, Grosse, Jacobsen, "Preventing gradient attenuation in Lipschitz
    constrained convolutional networks", NeurIPS 2019, algorithm 1.
    """
    _check(factor, halves)
    chosen = backends.choose("block_conv", factor, halves, backend=backend)
    dtype = factor.dtype
    if dtype.itemsize < 4:
        factor, halves = factor.float(), halves.float()
    if chosen == "reference":
        return _published(factor, halves).to(dtype)
    # Small kernels would spend more time in the registered op's dispatch than in their products.
    run = torch.ops.lipfast.block_conv if torch.compiler.is_compiling() else _Eager.apply
    if factor.dim() == 3:
        return run(factor, halves).to(dtype)
    return run(factor[None], halves[None])[0].to(dtype)


def _check(factor: Tensor, halves: Tensor) -> None:
    for name, value in (("factor", factor), ("halves", halves)):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"block_conv: {name} must be a torch.Tensor, got {type(value).__name__}"
            )
    if factor.dtype not in _DTYPES:
        expected = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(
            f"block_conv: the dtype of factor must be one of {expected}, got {factor.dtype}"
        )
    if halves.dtype != factor.dtype:
        raise TypeError(
            f"block_conv: halves must have the dtype {factor.dtype} of factor, got {halves.dtype}"
        )
    if halves.device != factor.device:
        raise ValueError(
            f"block_conv: halves must be on the device {factor.device} of factor, "
            f"got {halves.device}"
        )
    if factor.dim() not in (2, 3):
        raise ValueError(
            "block_conv: factor must have the shape (out, c) or (batch, out, c), "
            f"got {tuple(factor.shape)}"
        )
    *batch, _, channels = factor.shape
    fits = halves.dim() == factor.dim() + 1 and halves.shape[-3] % 2 == 0
    if not fits or list(halves.shape[:-3]) != batch or halves.shape[-2] != channels:
        lead = "".join(f"{n}, " for n in batch)
        raise ValueError(
            f"block_conv: halves must have the shape ({lead}an even number, {channels}, r) for "
            f"factor of shape {tuple(factor.shape)}, got {tuple(halves.shape)}"
        )


backends.register(
    "block_conv",
    {"torch": lambda factor, halves: None, "reference": lambda factor, halves: None},
)


def _published(factor: Tensor, halves: Tensor) -> Tensor:
    if factor.dim() == 2:
        return published(factor, halves @ halves.mT)
    if len(factor) == 0:
        return factor.new_empty(_shape(factor, halves))
    kernels = [published(h, q @ q.mT) for h, q in zip(factor, halves, strict=True)]
    return torch.stack(kernels)


def _shape(factor: Tensor, halves: Tensor) -> tuple[int, ...]:
    size = 1 + halves.shape[1] // 2
    return (*factor.shape, size, size)


def _forward(factor: Tensor, halves: Tensor) -> Tensor:
    if 0 in _shape(factor, halves):
        return factor.new_empty(_shape(factor, halves))
    with without_autocast(factor):
        kernel = factor[:, None, None]
        for index, half in enumerate(halves.unbind(1)):
            kernel = _compose(kernel, kernel.flatten(1, 3) @ half, half, index)
        return kernel.permute(0, 3, 4, 1, 2).clone(memory_format=torch.contiguous_format)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """Gradients by differentiable operations: with create_graph they can be derived again."""
    factor, halves = ctx.saved_tensors
    if 0 in _shape(factor, halves):
        return torch.zeros_like(factor), torch.zeros_like(halves)
    with without_autocast(factor):
        kernel, stages = factor[:, None, None], []
        for index, half in enumerate(halves.unbind(1)):
            inner = kernel.flatten(1, 3) @ half
            stages.append((index, half, kernel, inner))
            if index + 1 < halves.shape[1]:
                kernel = _compose(kernel, inner, half, index)
        grad = grad.permute(0, 3, 4, 1, 2).contiguous()
        for_halves: list[Tensor] = []
        for index, half, kernel, inner in reversed(stages):
            axis, size = _axis(index), kernel.shape[_axis(index)]
            for_rest = grad.narrow(axis, 1, size)
            for_kept = (grad.narrow(axis, 0, size) - for_rest).flatten(1, 3)
            for_inner = for_kept @ half
            for_half = torch.baddbmm(for_kept.mT @ inner, kernel.flatten(1, 3).mT, for_inner)
            for_halves.insert(0, for_half)
            grad = torch.baddbmm(for_rest.flatten(1, 3), for_inner, half.mT)
            grad = grad.view(kernel.shape)
        for_factor = grad[:, 0, 0].contiguous()
        return for_factor, torch.stack(for_halves, 1) if for_halves else torch.zeros_like(halves)


def _compose(kernel: Tensor, inner: Tensor, half: Tensor, index: int) -> Tensor:
    """K P with a tap of zeros behind it plus K - K P with one before it, for inner = K Q.

    Kernels are (batch, kh, kw, out, c), so that their taps are the rows of one matrix.
    """
    axis = _axis(index)
    kept = (inner @ half.mT).view(kernel.shape)
    rest, more = kernel - kept, kernel.shape[axis] - 1
    first, last = kept.narrow(axis, 0, 1), rest.narrow(axis, more, 1)
    if more == 0:
        return torch.cat([first, last], axis)
    between = kept.narrow(axis, 1, more) + rest.narrow(axis, 0, more)
    return torch.cat([first, between, last], axis)


def _axis(index: int) -> int:
    return 1 + index % 2


class _Eager(torch.autograd.Function):
    """The op without a dispatcher."""

    @staticmethod
    def forward(ctx, factor, halves):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(factor, halves)
        return _forward(factor, halves)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _backward(ctx, grad)


def _forward_fake(factor: Tensor, halves: Tensor) -> Tensor:
    return factor.new_empty(_shape(factor, halves))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


torch.library.define("lipfast::block_conv", "(Tensor factor, Tensor halves) -> Tensor")
torch.library.impl("lipfast::block_conv", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::block_conv", _forward_fake)
torch.library.register_autograd("lipfast::block_conv", _backward, setup_context=_save)
