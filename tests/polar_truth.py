"""Polar factors and their derivatives in float64, for the tests of the kernels."""

import torch
from torch import Tensor

# minimax steps of degrees 5, 3 and 5 for sigma_min / normaliser >= 0.07, and two contracting ones
SCHEDULE = (
    (6.223005883, -16.16240412, 11.43519044),
    (1.806204536, -0.5391453813, 0.0),
    (1.958467014, -1.337228606, 0.3817765297),
    (1.5, -0.5, 0.0),
    (1.5, -0.5, 0.0),
)


def draw(batch: int, planes: int, rows: int, columns: int, conditioning: float = 1.5) -> Tensor:
    """Matrices (B, P, m, n) with singular values from 1 to `conditioning`, float32."""
    generator = torch.Generator().manual_seed(rows + 100 * columns)
    dtype = torch.complex128 if planes == 2 else torch.float64
    matrix = torch.randn(batch, rows, columns, dtype=dtype, generator=generator)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linspace(1, conditioning, rows, dtype=torch.float64)
    return to_planes((left * values) @ right)


def to_planes(matrix: Tensor) -> Tensor:
    parts = [matrix.real, matrix.imag] if matrix.is_complex() else [matrix]
    return torch.stack(parts, dim=1).float()


def from_planes(x: Tensor) -> Tensor:
    x = x.double()
    return torch.complex(x[:, 0], x[:, 1]) if x.shape[1] == 2 else x[:, 0]


def polar_factor(x: Tensor) -> Tensor:
    """(B, m, n) for planes (B, P, m, n)."""
    left, _, right = torch.linalg.svd(from_planes(x), full_matrices=False)
    return left @ right


def derivative(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dx as a matrix (B, m, n), by automatic differentiation of the singular values."""
    planes = x.double().requires_grad_()
    inner = (polar_factor(planes).conj() * from_planes(grad)).sum().real
    return from_planes(torch.autograd.grad(inner, planes)[0])


def defect(x: Tensor) -> Tensor:
    """||I - S||_F before the last step of SCHEDULE, (B,), in float64."""
    matrix = from_planes(x)
    gram = matrix @ matrix.mH
    square = gram @ gram
    bound = torch.minimum(
        torch.linalg.matrix_norm(square), torch.linalg.matrix_norm(square, torch.inf)
    )
    matrix = matrix / (bound.sqrt() * (1 + 1e-5)).sqrt()[:, None, None]
    for a, b, c in SCHEDULE[:-1]:
        gram = matrix @ matrix.mH
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    gram = matrix @ matrix.mH
    return torch.linalg.matrix_norm(torch.eye(gram.shape[-1], dtype=gram.dtype) - gram)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Of planes (B, P, m, n) against matrices (B, m, n), in the Frobenius norm."""
    return float(torch.linalg.vector_norm(from_planes(ours) - exact) / exact.norm())


def largest_singular_value(x: Tensor) -> float:
    return float(torch.linalg.svdvals(from_planes(x)).max())
