"""The polar factor in Triton: products with epilogues, no traffic with the host."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lipfast.kernels.launch import on_its_gpu
from lipfast.kernels.polar_adjoint import gram, two_sided
from lipfast.kernels.polar_multiply import default_precision, multiply

# So many steps are meant for small singular values, and amplify the errors of TF32 to a failure.
_LONG = 7
# Added to H where w has not converged, as a share of the root mean square singular value.
_SHIFT = 0.1
_BLOCK = 1024  # numbers of a matrix that one program of an elementwise kernel changes


@on_its_gpu
def polar_forward(
    x: Tensor, schedule: Sequence[tuple[float, float, float]]
) -> tuple[Tensor, Tensor]:
    """Return the polar factor of x, and how far from it the last step began.

    Args:
        x: (B, P, m, n), float32, contiguous, m <= n; P = 1 real, 2 real and imaginary part.
        schedule: steps (a, b, c): X <- a X + (b S + c S^2) X with S = X X^H; c = 0 in the last
            one, which has full float32 precision.

    Returns:
        W (B, P, m, n), and the Frobenius norm of I - S at the last step, (B,).
    """
    batch, planes, rows, columns = x.shape
    if schedule[-1][2]:
        raise ValueError(f"polar: the last step must have c = 0, got {schedule[-1]}")
    if x.numel() == 0:
        return torch.empty_like(x), x.new_zeros(batch)
    precision, last_precision = _precisions(schedule)
    w = torch.empty_like(x)
    turned, next_turned = x.new_empty(2, batch, planes, columns, rows)
    s, s2 = x.new_empty(2, batch, planes, rows, rows)
    _scale(x, w, turned)
    gram(w, s, precision)
    factors = _normaliser(gram(s, s2, precision, reduce="norms"))
    # The last step alone measures the defect: a schedule of one step gets an idle one before it.
    *steps, (a, b, _) = schedule if len(schedule) > 1 else ((1.0, 0.0, 0.0), *schedule)
    for index, step in enumerate(steps):
        if index > 0:
            gram(w, s, precision)
            if step[2]:
                gram(s, s2, precision)
        multiply(
            s,
            s2 if step[2] else None,
            turned,
            step,
            precision,
            add=w,
            factors=factors if index == 0 else None,
            out=w,
            out_turned=next_turned,
        )
        turned, next_turned = next_turned, turned
    # a X + b S X as (a + b) X + b (S - I) X, where the second term is small
    defect = gram(w, s, last_precision, reduce="defect")
    multiply(s, None, turned, (a + b, b, 0.0), last_precision, add=w, out=w)
    return w, defect.sum(dim=1).sqrt_()


@on_its_gpu
def polar_backward(grad: Tensor, x: Tensor, w: Tensor, steps: int) -> Tensor:
    """Return dL/dx from grad = dL/dW, by conjugate gradients on H L + L H = G W^H - W G^H.

    Args:
        grad: G, as x, contiguous.
        x: (B, P, m, n), float32, contiguous, m <= n; P = 1 real, 2 real and imaginary part.
        w: the polar factor of x, contiguous.
        steps: of the conjugate gradients, at least 1. A matrix whose squared residual has fallen
            to 1e-12 of the first stays as it is.
    """
    batch, planes, rows, columns = x.shape
    if x.numel() == 0:
        return torch.empty_like(x)
    precision = default_precision()
    x_size, grad_size = _largest(x), _largest(grad)
    x_factor, grad_factor = _inverse(x_size), _inverse(grad_size)
    wide = columns > rows
    h = _polar_factor(x * x_factor[:, None, None, None], w, precision)
    right = x.new_empty(batch * (2 if wide else 1), planes, rows, rows)
    two_sided(grad, w, right[:batch], precision, skew=batch, scale=grad_factor)
    if wide:  # H^-1 solves H Y + Y H = 2 I and joins the batch
        right[batch:].zero_()[:, 0].diagonal(dim1=-2, dim2=-1).fill_(2)
    solution = _solve(h, right, batch, steps, precision)
    turned, out = w.mT.contiguous(), torch.empty_like(x)
    one = torch.ones_like(x_size)
    back = torch.stack([one, grad_size * x_factor, one], dim=1)
    if wide:  # H^-1 (G - G W^H W), with G W^H half the sum of both two-sided products
        two_sided(grad, w, h, precision, skew=0, scale=grad_factor)
        normal, normal_turned = torch.empty_like(x), torch.empty_like(turned)
        multiply(
            right[:batch],
            h,
            turned,
            (1.0, -0.5, -0.5),
            precision,
            add=grad,
            factors=torch.stack([grad_factor, one, one], dim=1),
            out=normal,
            out_turned=normal_turned,
        )
        inverse = solution[batch:]
        multiply(inverse, None, normal_turned, (0.0, 1.0, 0.0), precision, factors=back, out=out)
    add = out if wide else None
    skew = solution[:batch]
    multiply(skew, None, turned, (1.0, 1.0, 0.0), precision, add=add, factors=back, out=out)
    return out


def _precisions(schedule: Sequence[tuple[float, float, float]]) -> tuple[str, str]:
    """Of all steps but the last, and of the last."""
    exact = "tf32x3" if default_precision() == "tf32" else "ieee"
    return exact if len(schedule) >= _LONG else default_precision(), exact


def _polar_factor(x: Tensor, w: Tensor, precision: str) -> Tensor:
    """Return H = (x x^H)^(1/2) = x W^H, kept positive definite where W has not converged."""
    batch, planes, rows, _ = x.shape
    h = x.new_empty(batch, planes, rows, rows)
    shift = torch.linalg.vector_norm(x.flatten(1), dim=1) * (_SHIFT / rows**0.5)
    shift = shift.clamp_min_(_SHIFT / rows**0.5)  # as if x were not 0
    left = torch.addcmul(x, shift[:, None, None, None], w, value=-1)
    two_sided(left, w, h, precision, skew=0, scale=torch.full_like(shift, 0.5))
    h[:, 0].diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    return h


def _largest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), math.inf, dim=1)


def _inverse(size: Tensor) -> Tensor:
    return 1 / torch.where(size == 0, 1, size)


def _scale(x: Tensor, out: Tensor, turned: Tensor) -> None:
    """Write x divided by the largest entry of its matrix, as it is and turned."""
    batch, planes, rows, columns = x.shape
    programs = triton.cdiv(rows, 32) * triton.cdiv(columns, 32)
    polar_scale_kernel[(batch * planes * programs,)](
        x, _largest(x), out, turned, rows, columns, planes, TILE=32, num_warps=4
    )


def _normaliser(partial: Tensor) -> Tensor:
    """Return the powers -1/2, -3/2, -5/2 of nu = min(|S2|_F, |S2|_inf)^(1/2) (1 + 1e-5)."""
    batch, _, tiles, rows = partial.shape
    factors = partial.new_empty(batch, 3)
    block = min(1024, triton.next_power_of_2(rows))
    polar_normaliser_kernel[(batch,)](partial, factors, rows, tiles, BLOCK=block, num_warps=4)
    return factors


def _solve(h: Tensor, right: Tensor, skew: int, steps: int, precision: str) -> Tensor:
    """Solve H X + X H = right, skew-adjoint for the first `skew` matrices, self-adjoint after."""
    count, size = len(right), right[0].numel()
    solution, r, p, hp, product = right.new_empty(5, *right.shape)
    state, next_state = right.new_empty(2, count, 3)
    for step in range(steps):
        left = right if step == 0 else r
        partial = two_sided(left, h, product, precision, skew=skew, reduce="inner")
        tiles = partial.shape[-1]
        polar_update_kernel[(count * triton.cdiv(size, _BLOCK),)](
            partial,
            state,
            next_state,
            left,
            product,
            solution,
            r,
            p,
            hp,
            size,
            tiles,
            FIRST=step == 0,
            LAST=step == steps - 1,
            TILES=triton.next_power_of_2(tiles),
            BLOCK=_BLOCK,
            num_warps=8,
        )
        state, next_state = next_state, state
    return solution


@triton.jit
def polar_scale_kernel(x, largest, out, turned, rows, columns, planes, TILE: tl.constexpr):
    across = tl.cdiv(columns, TILE)
    programs = tl.cdiv(rows, TILE) * across
    matrix, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    i = (program // across) * TILE + tl.arange(0, TILE)
    j = (program % across) * TILE + tl.arange(0, TILE)
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    first = matrix * rows * columns
    here = first + i.to(tl.int64)[:, None] * columns + j[None, :]
    size = tl.load(largest + matrix // planes)
    value = tl.load(x + here, mask=inside, other=0.0) / tl.where(size == 0, 1.0, size)
    tl.store(out + here, value, mask=inside)
    there = first + j.to(tl.int64)[:, None] * rows + i[None, :]
    tl.store(turned + there, tl.trans(value), mask=tl.trans(inside))


@triton.jit
def polar_normaliser_kernel(partial, factors, rows, tiles, BLOCK: tl.constexpr):
    batch = tl.program_id(0).to(tl.int64)
    partial += batch * 2 * tiles * rows
    largest = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float32)
        for tile in range(tiles):
            here = partial + tile * rows + i
            sums += tl.load(here, mask=i < rows, other=0.0)
            total += tl.load(here + tiles * rows, mask=i < rows, other=0.0)
        largest = tl.maximum(largest, sums)
    frobenius = tl.sqrt(tl.sum(total))
    bound = tl.minimum(frobenius, tl.max(largest, axis=0))
    # A NaN reaches the sum of squares, and may get lost in a maximum.
    nu = tl.sqrt(tl.where(frobenius == frobenius, bound, frobenius)) * (1 + 1e-5)
    root = tl.where(nu == 0, 0.0, 1 / tl.sqrt(nu))
    factors += batch * 3
    tl.store(factors, root)
    tl.store(factors + 1, root * root * root)
    tl.store(factors + 2, root * root * root * root * root)


@triton.jit
def polar_update_kernel(
    partial,
    state,
    next_state,
    left,
    product,
    solution,
    r,
    p,
    hp,
    size,
    tiles,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of conjugate gradients with a single reduction (Chronopoulos and Gear 1989)."""
    programs = tl.cdiv(size, BLOCK)
    batch, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    tile = tl.arange(0, TILES)
    partial += batch * 2 * tiles
    rr = tl.sum(tl.load(partial + tile, mask=tile < tiles, other=0.0))
    curvature = tl.sum(tl.load(partial + tiles + tile, mask=tile < tiles, other=0.0))
    beta = 0.0
    first_rr = rr
    if not FIRST:
        state += batch * 3
        first_rr = tl.load(state + 2)
        beta = rr / tl.load(state)
        curvature -= beta * rr / tl.load(state + 1)
    # NaN is not frozen: it shows in the result.
    frozen = (rr <= 1e-12 * first_rr) | (curvature <= 0)
    alpha = tl.where(frozen, 0.0, rr / curvature)
    beta = tl.where(frozen, 0.0, beta)
    if program == 0:
        next_state += batch * 3
        tl.store(next_state, rr)
        tl.store(next_state + 1, alpha)
        tl.store(next_state + 2, tl.where(frozen, float("inf"), first_rr))
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    here = batch * size + at
    r_old = tl.load(left + here, mask=inside)
    direction = r_old
    image = tl.load(product + here, mask=inside)
    change = alpha * direction
    if not FIRST:
        direction += beta * tl.load(p + here, mask=inside)
        image += beta * tl.load(hp + here, mask=inside)
        change = tl.load(solution + here, mask=inside) + alpha * direction
    r_new = r_old - alpha * image
    if LAST:
        # One more step, with the factors of the last: no product, and nearly as good as its own.
        change += alpha * (r_new + beta * direction)
    else:
        tl.store(p + here, direction, mask=inside)
        tl.store(hp + here, image, mask=inside)
        tl.store(r + here, r_new, mask=inside)
    tl.store(solution + here, change, mask=inside)
