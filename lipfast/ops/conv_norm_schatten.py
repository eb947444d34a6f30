"""Schatten norms by Gram iteration: bounds of the spectral norm, with a closed-form derivative."""

import torch
from torch import Tensor

from lipfast.ops.context import by_torch, without_autocast


def schatten_norm(matrix: Tensor, squarings: int, *, planar: bool = False) -> Tensor:
    """Return (sum_i sigma_i^p)^(1/p) >= norm_2(matrix), p = 2^(squarings + 1).

    The backward pass keeps the matrix, computes its powers again, and can be differentiated.
    Derivation: docs/math/conv_norm.md.

    Args:
        matrix: (..., m, n) real, or with `planar` (..., 2, m, n), real and imaginary parts.
        squarings: number of squarings of the Gram matrix, the first product counted.

    Returns:
        Tensor (...); 0 for a zero matrix, NaN for one that is not finite.

    Source: Delattre et al., "Efficient bound of Lipschitz constant for convolutional layers by Gram
    iteration", ICML 2023, theorem 1 and algorithm 3.
    """
    return torch.ops.lipfast.schatten_norm(matrix, planar, squarings)


def _forward(matrix: Tensor, planar: bool, squarings: int) -> Tensor:
    with without_autocast(matrix):
        power, scale = _normalised(_wide(matrix.contiguous()), planar)
        log_norm = scale.log()
        for step in range(1, squarings + 1):
            power, norm = _normalised(_gram_matrix(power, planar), planar)
            log_norm += norm.log() / 2**step
        return torch.where(scale == 0, 0, log_norm.exp()).flatten(-3 if planar else -2).squeeze(-1)


def _backward(grad: Tensor, matrix: Tensor, bound: Tensor, planar: bool, squarings: int) -> Tensor:
    """grad (X X^H)^(p / 2 - 1) X / bound^(p - 1), where p / 2 - 1 = 1 + 2 + 4 + ...

    The powers are known up to factors, so the length follows from <result, matrix> = grad bound.
    """
    axes = (-3, -2, -1) if planar else (-2, -1)
    with without_autocast(matrix):
        power, scale = _normalised(_wide(matrix.contiguous()), planar)
        powers = [power]
        for _ in range(squarings):
            powers.append(_normalised(_gram_matrix(powers[-1], planar), planar)[0])
        direction = powers[0]
        for power in powers[1:]:
            direction, _ = _normalised(_product(power, direction, planar), planar)
        along = (direction * powers[0]).sum(dim=axes, keepdim=True) * scale
        shape = (*bound.shape, *(1,) * len(axes))
        factor = (grad * bound).view(shape) / torch.where(along == 0, 1, along)
        direction = direction * torch.where(along == 0, 0, factor)
        return direction.mT.contiguous() if _is_tall(matrix) else direction


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _wide(matrix: Tensor) -> Tensor:
    """With the smaller Gram matrix. The transpose has the same singular values."""
    return matrix.mT if _is_tall(matrix) else matrix


def _normalised(matrix: Tensor, planar: bool) -> tuple[Tensor, Tensor]:
    """Return matrix / s and its Frobenius norm s (..., 1, 1), found without overflow; 0 is kept."""
    axes = (-3, -2, -1) if planar else (-2, -1)
    largest = matrix.abs().amax(dim=axes, keepdim=True)
    matrix = matrix / torch.where(largest == 0, 1, largest)
    norm = torch.linalg.vector_norm(matrix, dim=axes, keepdim=True)
    return matrix / torch.where(norm == 0, 1, norm), norm * largest


def _gram_matrix(matrix: Tensor, planar: bool) -> Tensor:
    if not planar:
        return matrix @ matrix.mT
    m = matrix.shape[-2]
    stacked = matrix.flatten(-3, -2)
    products = stacked @ stacked.mT
    real = products[..., :m, :m] + products[..., m:, m:]
    return torch.stack([real, products[..., m:, :m] - products[..., :m, m:]], dim=-3)


def _product(left: Tensor, right: Tensor, planar: bool) -> Tensor:
    if not planar:
        return left @ right
    a, b = left.unbind(-3)
    product = torch.cat([torch.cat([a, -b], dim=-1), torch.cat([b, a], dim=-1)], dim=-2)
    return (product @ right.flatten(-3, -2)).unflatten(-2, (2, a.shape[-2]))


def _forward_fake(matrix: Tensor, planar: bool, squarings: int) -> Tensor:
    return matrix.new_empty(matrix.shape[: -3 if planar else -2])


def _backward_fake(
    grad: Tensor, matrix: Tensor, bound: Tensor, planar: bool, squarings: int
) -> Tensor:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    matrix, ctx.planar, ctx.squarings = inputs
    ctx.save_for_backward(matrix, output)


def _gradient(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    arguments = (grad, *ctx.saved_tensors, ctx.planar, ctx.squarings)
    if by_torch(grad):
        return _backward(*arguments), None, None
    return torch.ops.lipfast.schatten_norm_backward(*arguments), None, None


torch.library.define(
    "lipfast::schatten_norm", "(Tensor matrix, bool planar, int squarings) -> Tensor"
)
torch.library.impl("lipfast::schatten_norm", ("cpu", "cuda"), _forward)
torch.library.register_fake("lipfast::schatten_norm", _forward_fake)
torch.library.register_autograd("lipfast::schatten_norm", _gradient, setup_context=_save)

torch.library.define(
    "lipfast::schatten_norm_backward",
    "(Tensor grad, Tensor matrix, Tensor bound, bool planar, int squarings) -> Tensor",
)
torch.library.impl("lipfast::schatten_norm_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("lipfast::schatten_norm_backward", _backward_fake)
