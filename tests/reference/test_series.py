"""The polynomials of SOC: what they promise on the imaginary axis, for float64 coefficients."""

import cmath
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lipfast import reference

F64 = torch.float64
DEGREES = [(1, 0.5), (3, 1.0), (4, 1.5), (4, 2.1), (5, 2.1), (6, 2.1), (5, 3.5), (8, math.pi)]
# largest 1 - |p|^2 on [0, limit]
DEFECTS = {(3, 1.0): 9.2e-4, (4, 1.5): 1.7e-4, (4, 2.1): 2.3e-3, (5, 2.1): 4.6e-5, (6, 2.1): 6e-7}


def values(coefficients: tuple[float, ...], t: Tensor) -> Tensor:
    return sum(a * (1j * t) ** k for k, a in enumerate(coefficients))


@pytest.mark.parametrize(("terms", "limit"), [*DEGREES, (12, 2.1), (20, 3.0)])
def test_unimodular_polynomials_are_contracting_and_nearly_orthogonal(terms, limit):
    coefficients = reference.unimodular_coefficients(terms, limit)
    assert len(coefficients) == terms + 1
    assert all(isinstance(a, float) and a > 0 for a in coefficients)
    t = torch.linspace(0, limit, 100_001, dtype=F64)
    modulus = values(coefficients, t).abs()
    assert float(modulus.max()) <= 1 + 1e-13
    if (terms, limit) in DEFECTS:
        defect = 1 - float(modulus.min()) ** 2
        assert 0.8 * DEFECTS[terms, limit] <= defect <= DEFECTS[terms, limit]


@pytest.mark.parametrize(("terms", "limit"), DEGREES)
def test_unimodular_polynomials_oscillate_and_turn_as_they_are_made_to(terms, limit):
    coefficients = reference.unimodular_coefficients(terms, limit)
    nodes = [limit * math.cos(math.pi * j / (2 * terms)) for j in range(terms + 1)]
    squared = values(coefficients, torch.tensor(nodes, dtype=F64)).abs() ** 2
    least = float(squared[1])
    for j, value in enumerate(squared.tolist()):
        assert value == pytest.approx(1 if j % 2 == 0 else least, abs=1e-12)
    t = torch.linspace(0, limit, 1001, dtype=F64)
    steps = (values(coefficients, t)[1:] / values(coefficients, t)[:-1]).angle()
    assert float(steps.sum()) == pytest.approx(limit, rel=1e-9)
    zeros = torch.linalg.eigvals(companion(coefficients))
    assert float(zeros.real.max()) < 0


def companion(coefficients: tuple[float, ...]) -> Tensor:
    """A matrix whose eigenvalues are the zeros of the polynomial."""
    n = len(coefficients) - 1
    matrix = torch.diag(torch.ones(n - 1, dtype=F64), -1)
    matrix[:, -1] = -torch.tensor(coefficients[:-1], dtype=F64) / coefficients[-1]
    return matrix


def exact_modulus(coefficients: tuple[float, ...], u: Fraction) -> Fraction:
    """|p(i t)|^2 at u = t^2."""
    parts = [Fraction(0), Fraction(0)]
    for k, a in enumerate(coefficients):
        parts[k % 2] += (-1) ** (k // 2) * Fraction(a) * u ** (k // 2)
    return parts[0] ** 2 + u * parts[1] ** 2


@pytest.mark.parametrize(("terms", "limit"), [(5, 2.1), (12, 6.3), (30, 7.7), (30, 10.5)])
def test_rounded_coefficients_make_a_contraction(terms, limit):
    """In rational numbers, at the places of the largest values: 3e-14 to 7e-13 above 1 if p is
    divided by its supremum once.
    """
    nodes = [limit**2 * (1 + math.cos(math.pi * j / terms)) / 2 for j in range(terms + 1)]
    nodes += [limit**2 * j / 50 for j in range(51)]
    for coefficients in (
        reference.unimodular_coefficients(terms, limit),
        reference.contracting(reference.taylor_coefficients(terms), limit),
    ):
        assert max(exact_modulus(coefficients, Fraction(u)) for u in nodes) <= 1 + Fraction(3e-15)


def test_a_degree_too_small_for_the_interval_is_refused():
    with pytest.raises(ValueError, match=r"terms: expected a degree that reaches 2\.1 .*got 1"):
        reference.unimodular_coefficients(1, 2.1)


@pytest.mark.parametrize("terms", [1, 2, 4, 5, 12])
@pytest.mark.parametrize("bound", [0.0, 0.3, 1.9, 2.1, 2.3, 3.5, 6.0])
def test_supremum_on_an_interval_of_any_length(terms, bound):
    polynomials = [reference.taylor_coefficients(terms), (1.0, -0.3, 2.0, 0.5)]
    if terms > 1:
        polynomials.append(reference.unimodular_coefficients(terms, 2.1))
    t = torch.linspace(0, bound, 50_001, dtype=F64)
    for coefficients in polynomials:
        largest = float(values(coefficients, t).abs().max())
        supremum = reference.polynomial_supremum(coefficients, bound)
        assert largest * (1 - 1e-12) <= supremum <= largest * (1 + 1e-7)


def test_taylor_series():
    assert reference.taylor_coefficients(3) == (1.0, 1.0, 0.5, 1 / 6)
    z = 0.3 + 0.4j
    total = sum(a * z**k for k, a in enumerate(reference.taylor_coefficients(25)))
    assert total == pytest.approx(cmath.exp(z), abs=1e-15)
    assert reference.taylor_supremum(5, 2.1) == pytest.approx(1.004741, abs=1e-6)
    assert reference.taylor_supremum(4, 2.828) == 1
    assert reference.taylor_supremum(12, 3.379) == 1
    assert reference.taylor_supremum(12, 3.38) > 1


@pytest.mark.parametrize("k", [1, 3, 5])
def test_norm_of_a_skew_convolution(k):
    for seed, c in enumerate((1, 2, 5)):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(c, c, k, k, generator=generator, dtype=F64)
        kernel = reference.skew_kernel(weight)
        side = max(1, 8 * (k - 1))
        norm, bound = reference.skew_norm_bound(kernel, side)
        for size in ((side, side), (5, 7), (41, 40)):
            spectrum = reference.kernel_spectrum(kernel, size)
            true = float(torch.linalg.matrix_norm(spectrum, 2).max())
            assert true * (1 - 1e-12) <= float(bound)
            if size == (side, side):
                assert true * (1 - 1e-12) <= float(norm) <= true * 1.004 + 1e-12
        assert float(bound) <= float(norm) * 1.05 + 1e-12
        vectors = torch.randn(2, side * (side // 2 + 1), c, generator=generator, dtype=F64)
        vectors = vectors / vectors.norm(dim=(0, 2), keepdim=True)
        for _ in range(100):
            estimate, vectors = reference.skew_power_iteration(kernel, vectors, side)
            assert float(estimate) <= float(norm) * (1 + 1e-12)
        assert float(estimate) >= 0.99 * float(norm)


def test_power_iteration_of_a_zero_kernel_keeps_its_vectors():
    vectors = torch.full((2, 12, 2), 0.5, dtype=F64)
    kernel = torch.zeros(2, 2, 3, 3, dtype=F64, requires_grad=True)
    estimate, following = reference.skew_power_iteration(kernel, vectors, 4)
    assert float(estimate.detach()) == 0
    assert torch.equal(following, vectors)
    estimate.backward()
    assert bool(kernel.grad.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e3])
def test_power_iteration_recovers_from_any_vectors(value):
    kernel = reference.skew_kernel(torch.randn(3, 3, 3, 3, dtype=F64))
    norm, _ = reference.skew_norm_bound(kernel, 16)
    vectors = torch.full((2, 16 * 9, 3), value, dtype=F64)
    for _ in range(100):
        estimate, vectors = reference.skew_power_iteration(kernel, vectors, 16)
        assert 0 < float(estimate) <= float(norm) * (1 + 1e-12)
    assert float(estimate) >= 0.98 * float(norm)
