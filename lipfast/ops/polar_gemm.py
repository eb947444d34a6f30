"""Polar factors and their derivatives as real matrix products, planar complex or real.

A matrix (B, P, m, n) with P = 1 plane (real) or P = 2 (real and imaginary part) is worked on as the
stack of its planes, (B, P m, n). A square factor on the left takes its real form, for P = 2 the
(2m, 2m) matrix [[Re, -Im], [Im, Re]], whose first m columns are its stack.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipfast.ops.polar_schedules import Step

# On a CPU a block of matrices goes through all steps while it stays in the caches. Per thread.
_BLOCK_BYTES = 1 << 18
# Added to the polar factor H = (x x^H)^(1/2) where w has not converged, as a share of the root mean
# square singular value: conjugate gradients then meet a positive definite H whatever x is.
SHIFT = 0.1


def polar_forward(x: Tensor, schedule: tuple[Step, ...]) -> tuple[Tensor, Tensor]:
    """Return the polar factor of x (B, P, m, n), m <= n, and ||I - X X^H||_F of the last step.

    Args:
        x: contiguous, float64 or float32.
        schedule: (a, b, c) of each step X <- a X + (b S + c S^2) X, S = X X^H; c = 0 in the last.
    """
    w, residual = _in_blocks(lambda x: _forward(x, schedule), x)
    return w, residual


def polar_backward(grad: Tensor, x: Tensor, w: Tensor, steps: int) -> Tensor:
    """Return dL/dx for grad = dL/dw and w the polar factor of x, by conjugate gradients."""
    return _in_blocks(lambda g, x, w: (_implicit(g, x, w, steps),), grad, x, w)[0]


def polar_jvp(grad: Tensor, x: Tensor, schedule: tuple[Step, ...]) -> Tensor:
    """Return the derivative of the schedule's own map at x applied to grad = dL/dw.

    The Jacobian of an odd polynomial of a matrix is self-adjoint: this is dL/dx.
    """
    return _in_blocks(lambda g, x: (_tangent(g, x, schedule),), grad, x)[0]


def _in_blocks(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    first = tensors[0]
    cached = _BLOCK_BYTES * torch.get_num_threads()
    count = max(1, cached // (first[0].numel() * first.element_size()))
    if first.device.type != "cpu" or len(first) <= count:
        return function(*tensors)
    blocks = [function(*block) for block in zip(*(t.split(count) for t in tensors), strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


def _forward(x: Tensor, schedule: tuple[Step, ...]) -> tuple[Tensor, Tensor]:
    planes = x.shape[1]
    stack, gram, square, _, _ = normalised(x)
    (a, b, c), *steps, last = schedule
    left = _left(gram.mul_(b).add_(square, alpha=c), planes)
    stack = torch.baddbmm(stack, left, stack, beta=a)
    for a, b, c in steps:
        gram = _gram(stack, planes)
        left = _left(gram, planes)
        if c:
            left = _left(torch.baddbmm(gram, left, gram, beta=b, alpha=c), planes)
            b = 1.0
        stack = torch.baddbmm(stack, left, stack, beta=a, alpha=b)
    return _last_step(stack, planes, last)


def normalised(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X = x / (scale nu), S = X X^H and S^2 as stacks, nu and scale (B, 1, 1).

    scale is the largest entry of x, and with G = x x^H / scale^2
    nu^2 = min(||G^2||_F, ||G^2||_inf)^(1/2) (1 + 1e-5) >= norm_2(G).
    """
    batch, planes, m, n = x.shape
    scale = _largest(x)
    stack = x.view(batch, planes * m, n) / scale
    gram = _gram(stack, planes)
    square = torch.bmm(_left(gram, planes), gram)
    moduli = square.view(batch, planes, m, m).square().sum(1)
    frobenius = moduli.sum((1, 2)).sqrt()
    rows = moduli.sqrt_().sum(2).amax(1)
    bound = torch.minimum(frobenius, rows).sqrt() * (1 + 1e-5)
    # at least 1 after the division by the largest entry, unless x is 0
    bound = bound.clamp_min(0.5)[:, None, None]
    stack *= bound.rsqrt()
    gram /= bound
    square /= bound * bound
    return stack, gram, square, bound.sqrt(), scale


def _last_step(stack: Tensor, planes: int, step: Step) -> tuple[Tensor, Tensor]:
    # The norm of the result rests on this step: its products never run in TF32 or bfloat16.
    a, b, _ = step
    batch, m, n = stack.shape[0], stack.shape[1] // planes, stack.shape[2]
    product = _exact_bmm if _rounds_products(stack) else torch.bmm
    gram = _gram(stack, planes, product)
    gram[:, :m].diagonal(dim1=1, dim2=2).sub_(1)
    residual = torch.linalg.vector_norm(gram, dim=(1, 2))
    # a X + b S X = (a + b) X + b (S - I) X, whose second term is small after convergence
    w = torch.add((a + b) * stack, product(_left(gram, planes), stack), alpha=b)
    return w.view(batch, planes, m, n), residual


def _implicit(grad: Tensor, x: Tensor, w: Tensor, steps: int) -> Tensor:
    batch, planes, m, n = x.shape
    # The derivative at x / scale of grad / size, so that squares neither overflow nor vanish.
    scale, size = _largest(x), _largest(grad)
    x, grad = (t.view(batch, planes * m, n) / s for t, s in ((x, scale), (grad, size)))
    w = w.view(batch, planes * m, n)
    shift = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) * (SHIFT / m**0.5)
    shift = shift.clamp_min(SHIFT / m**0.5)  # as if x were not 0
    polar = _product_with_adjoint(x - shift * w, w, planes)
    polar = _plus_adjoint(polar, planes).mul_(0.5)
    polar[:, :m].diagonal(dim1=1, dim2=2).add_(shift[:, :, 0])
    left = _left(polar, planes)
    inner = _product_with_adjoint(grad, w, planes)

    def lyapunov(p: Tensor) -> Tensor:
        return _minus_adjoint(torch.bmm(left, p), planes)

    skew = _conjugate_gradients(lyapunov, _minus_adjoint(inner, planes), steps)
    out = torch.bmm(_left(skew, planes), w)
    if m < n:
        rest = torch.baddbmm(grad, _left(inner, planes), w, alpha=-1)
        out += _conjugate_gradients(lambda p: torch.bmm(left, p), rest, steps)
    factor = (size / scale).clamp_max(torch.finfo(x.dtype).max)  # 0 stays 0
    return out.mul_(factor).view(batch, planes, m, n)


def _conjugate_gradients(operator: Callable[[Tensor], Tensor], right: Tensor, steps: int) -> Tensor:
    """Solve operator(solution) = right, matrix by matrix, in `steps` steps from 0; eats `right`."""
    solution, direction = torch.zeros_like(right), right.clone()
    residual = right
    size = _inner(residual, residual)
    # Past this point the remainder is rounding error, and further steps would divide by it.
    negligible = size * (8 * torch.finfo(right.dtype).eps) ** 2
    for _ in range(steps):
        image = operator(direction)
        active = size > negligible
        alpha = torch.where(active, size / _inner(direction, image), 0)
        solution.addcmul_(direction, alpha)
        residual.addcmul_(image, alpha, value=-1)
        before, size = size, _inner(residual, residual)
        beta = torch.where(active, size / before, 0)
        torch.addcmul(residual, direction, beta, out=direction)
    # One more step, as long as the last: no product, and nearly as good as one of its own length.
    return solution.addcmul_(direction, alpha)


def _tangent(grad: Tensor, x: Tensor, schedule: tuple[Step, ...]) -> Tensor:
    """Push (X, D) through the schedule, D = grad at the start; the normaliser is a constant."""
    batch, planes, m, n = x.shape
    stack, gram, square, norm, scale = normalised(x)
    tangent = grad.view(stack.shape) / norm
    for number, (a, b, c) in enumerate(schedule):
        if number:
            gram = _gram(stack, planes)
            square = torch.bmm(_left(gram, planes), gram) if c else square
        slope = _plus_adjoint(_product_with_adjoint(tangent, stack, planes), planes)
        factor, change = b * gram, b * slope
        if c:
            product = torch.bmm(_left(slope, planes), gram)
            factor.add_(square, alpha=c)
            change.add_(_plus_adjoint(product, planes), alpha=c)
        left = _left(factor, planes)
        tangent = torch.baddbmm(tangent, left, tangent, beta=a)
        tangent = torch.baddbmm(tangent, _left(change, planes), stack)
        if number + 1 < len(schedule):
            stack = torch.baddbmm(stack, left, stack, beta=a)
    return (tangent / scale).view(batch, planes, m, n)


def _largest(x: Tensor) -> Tensor:
    """Largest entry of each matrix, (B, 1, 1), and 1 for a zero matrix."""
    # a tenth of the time of torch.linalg.vector_norm(x, inf) on a CPU
    largest = x.abs().amax((1, 2, 3))[:, None, None]
    return largest + (largest == 0)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Re tr(A^H B) of each matrix, (B, 1, 1)."""
    return (a * b).sum((1, 2), keepdim=True)


# Products and adjoints of stacks ----------------------------------------------------------------

_Product = Callable[[Tensor, Tensor], Tensor]


def _gram(stack: Tensor, planes: int, product: _Product = torch.bmm) -> Tensor:
    """X X^H."""
    return _product_with_adjoint(stack, stack, planes, product)


def _product_with_adjoint(
    a: Tensor, b: Tensor, planes: int, product: _Product = torch.bmm
) -> Tensor:
    """A B^H."""
    table = product(a, b.mT)
    if planes == 1:
        return table
    m = a.shape[1] // 2
    out = table.new_empty(len(table), 2 * m, m)
    torch.add(table[:, :m, :m], table[:, m:, m:], out=out[:, :m])
    torch.sub(table[:, m:, :m], table[:, :m, m:], out=out[:, m:])
    return out


def _left(stack: Tensor, planes: int) -> Tensor:
    """A square stack as a factor on the left."""
    if planes == 1:
        return stack
    m = stack.shape[2]
    left = stack.new_empty(len(stack), 2 * m, 2 * m)
    left[:, :, :m] = stack
    left[:, m:, m:] = stack[:, :m]
    torch.neg(stack[:, m:], out=left[:, :m, m:])
    return left


def _minus_adjoint(stack: Tensor, planes: int) -> Tensor:
    """A - A^H."""
    m = stack.shape[2]
    if planes == 1:
        return stack - stack.mT
    out = torch.empty_like(stack)
    torch.sub(stack[:, :m], stack[:, :m].mT, out=out[:, :m])
    torch.add(stack[:, m:], stack[:, m:].mT, out=out[:, m:])
    return out


def _plus_adjoint(stack: Tensor, planes: int) -> Tensor:
    """A + A^H."""
    m = stack.shape[2]
    if planes == 1:
        return stack + stack.mT
    out = torch.empty_like(stack)
    torch.add(stack[:, :m], stack[:, :m].mT, out=out[:, :m])
    torch.sub(stack[:, m:], stack[:, m:].mT, out=out[:, m:])
    return out


# Products in full precision ---------------------------------------------------------------------


def _rounds_products(x: Tensor) -> bool:
    """Whether PyTorch's settings let products of x run with operands shorter than float32."""
    if x.dtype != torch.float32:
        return False
    device: Any = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    matmul: Any = getattr(device, "matmul", None)
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision in ("tf32", "bf16")
    return matmul.allow_tf32 if x.is_cuda else torch.get_float32_matmul_precision() == "medium"


def _exact_bmm(a: Tensor, b: Tensor) -> Tensor:
    """A float32 product to float32's accuracy, whatever PyTorch's settings are."""
    return _split_bmm(a, b) if a.is_cuda else torch.bmm(a.double(), b.double()).float()


def _split_bmm(a: Tensor, b: Tensor) -> Tensor:
    """A float32 product from products that read TF32 operands."""
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    low = torch.baddbmm(torch.bmm(a_high, b_low), a_low, b_high)
    return torch.baddbmm(low, a_high, b_high)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = high + low, high of 11 significant bits, as TF32 has (Veltkamp's splitting)."""
    product = x * 8193.0
    high = product - (product - x)
    return high, x - high
