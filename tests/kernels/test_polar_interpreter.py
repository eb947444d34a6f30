"""The Triton kernels of the polar factor, executed on the CPU by Triton's interpreter."""

import math

import polar_truth as truth
import pytest
import torch

pytestmark = pytest.mark.interpreter
pytest.importorskip("triton")

SIZES = [(3, 1, 2), (3, 3, 3), (1, 17, 22), (1, 33, 66), (1, 64, 64)]


def check(x: torch.Tensor, steps: int) -> None:
    """Forward and backward against float64; the tolerances are a few roundings of float32."""
    from lipfast.kernels.polar import polar_backward, polar_forward

    w, residual = polar_forward(x, truth.SCHEDULE)
    exact = truth.polar_factor(x)
    assert truth.relative_error(w, exact) <= 1e-6
    assert truth.largest_singular_value(w) <= 1 + 1e-6
    torch.testing.assert_close(residual.double(), truth.defect(x), rtol=1e-2, atol=1e-5)

    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ours = polar_backward(grad, x, w, steps)
    expected = truth.derivative(grad, x)
    # of a real 1 x 1 matrix the derivative is 0
    error = torch.linalg.vector_norm(truth.from_planes(ours) - expected)
    assert error <= 1e-5 * max(expected.norm(), 1e-2 * grad.norm())


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
def test_forward_and_backward(batch, rows, columns, planes, poisoned_empty):
    check(truth.draw(batch, planes, rows, columns), steps=7)


@pytest.mark.parametrize(("rows", "columns"), [(17, 34), (33, 38)])
def test_several_tiles(rows, columns, monkeypatch, poisoned_empty):
    from lipfast.kernels import polar_adjoint, polar_multiply

    for module in (polar_adjoint, polar_multiply):  # 2 and 3 tiles a side
        monkeypatch.setattr(module, "tile_size", lambda *_: 16)
    check(truth.draw(1, 2, rows, columns), steps=7)


def test_several_programs_for_a_matrix(monkeypatch, poisoned_empty):
    from lipfast.kernels import polar

    monkeypatch.setattr(polar, "_BLOCK", 64)
    check(truth.draw(2, 2, 7, 9), steps=7)


def test_ill_conditioned_derivative():
    from lipfast.kernels.polar import polar_backward, polar_forward

    x = truth.draw(1, 2, 17, 20, conditioning=7.0)
    w, _ = polar_forward(x, truth.SCHEDULE)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    expected = truth.derivative(grad, x)
    assert truth.relative_error(polar_backward(grad, x, w, 8), expected) <= 1e-3


def test_converged_systems_stay_as_they_are():
    from lipfast.kernels.polar import polar_backward

    x = truth.draw(1, 2, 5, 8, conditioning=1.0)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    few, many = (polar_backward(grad, x, x, steps) for steps in (3, 12))
    assert torch.equal(few, many)
    assert truth.relative_error(many, truth.derivative(grad, x)) <= 1e-5


def test_zero_nan_and_scaled_matrices(poisoned_empty):
    from lipfast.kernels.polar import polar_backward, polar_forward

    x = truth.draw(6, 2, 5, 7)
    x[0] = 0
    x[1, 0, 2, 3] = math.nan
    x[2, 0, 2, 3] = math.inf
    unit = x[3:].clone()
    scale = torch.tensor([1e20, 1e-20, 1])[:, None, None, None]
    x[3:] *= scale
    w, residual = polar_forward(x, truth.SCHEDULE)
    assert not w[0].any()
    assert residual[0] == pytest.approx(5**0.5)
    assert w[1:3].isnan().all()
    assert residual[1:3].isnan().all()
    assert truth.relative_error(w[3:], truth.polar_factor(unit)) <= 1e-6

    grad = 1e-15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    ours = polar_backward(grad, x, w, 7)
    assert ours[0].isfinite().all()
    assert ours[1:3].isnan().all()
    expected = truth.derivative(grad[3:], unit)
    assert truth.relative_error(scale * ours[3:], expected) <= 1e-5
    assert not polar_backward(torch.zeros_like(x), x, w, 2)[3:].any()


def test_rank_deficient():
    from lipfast.kernels.polar import polar_backward, polar_forward

    x = truth.draw(1, 2, 6, 9)
    x[:, :, 4] = x[:, :, 1]
    w, residual = polar_forward(x, truth.SCHEDULE)
    assert residual[0] == pytest.approx(1, abs=1e-2)
    assert truth.largest_singular_value(w) <= 1 + 1e-6
    assert polar_backward(torch.ones_like(x), x, w, 8).isfinite().all()


def test_a_schedule_of_one_step():
    from lipfast.kernels.polar import polar_forward

    x = torch.eye(4, 6)[None, None]
    w, residual = polar_forward(x, [(1.5, -0.5, 0.0)])
    norm = (1 + 1e-5) ** 0.5  # as |S2|_inf = |I|_inf = 1
    exact = 1.5 / norm - 0.5 / norm**3
    values = torch.linalg.svdvals(truth.from_planes(w))
    torch.testing.assert_close(values, torch.full_like(values, exact), rtol=1e-6, atol=0)
    assert residual[0] == pytest.approx(2 * (1 - 1 / norm**2), abs=1e-6)


def test_two_calls_give_the_same_bits():
    from lipfast.kernels.polar import polar_backward, polar_forward

    x = truth.draw(2, 2, 9, 12)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    runs = []
    for _ in range(2):
        w, residual = polar_forward(x, truth.SCHEDULE)
        runs.append((w, residual, polar_backward(grad, x, w, 4)))
    assert all(map(torch.equal, *runs))


def test_an_empty_batch():
    from lipfast.kernels.polar import polar_backward, polar_forward

    x = torch.empty(0, 2, 3, 4)
    w, residual = polar_forward(x, truth.SCHEDULE)
    assert w.shape == x.shape
    assert residual.shape == (0,)
    assert polar_backward(x, x, w, 4).shape == x.shape


def test_precision_follows_the_settings_but_for_the_last_step(monkeypatch):
    from lipfast.kernels import polar

    step = (1.5, -0.5, 0.0)
    for setting, short, long in [
        ("ieee", ("ieee", "ieee"), ("ieee", "ieee")),
        ("tf32", ("tf32", "tf32x3"), ("tf32x3", "tf32x3")),
    ]:
        monkeypatch.setattr(polar, "default_precision", lambda setting=setting: setting)
        assert polar._precisions([step] * 5) == short
        assert polar._precisions([step] * 7) == long


def test_tf32_leaves_the_last_step_exact(monkeypatch):
    """The interpreter multiplies exactly: here it cuts TF32 operands as a tensor core may."""
    from triton.runtime.interpreter import InterpreterBuilder

    from lipfast.kernels import polar

    multiply, seen = InterpreterBuilder.create_dot, set()

    def rounded(builder, a, b, accumulator, precision, *rest):
        seen.add(str(precision).rpartition(".")[2])
        if str(precision).endswith(".TF32"):
            for operand in (a, b):
                operand.data = (operand.data.view("int32") & ~0x1FFF).view("float32")
        return multiply(builder, a, b, accumulator, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", rounded)
    monkeypatch.setattr(polar, "default_precision", lambda: "tf32")
    x = truth.draw(1, 2, 17, 34, conditioning=3.0)
    w, _ = polar.polar_forward(x, truth.SCHEDULE)
    assert seen == {"TF32", "TF32x3"}
    matrix = truth.from_planes(w)
    identity = torch.eye(17, dtype=matrix.dtype)
    assert torch.linalg.matrix_norm(matrix @ matrix.mH - identity, 2) <= 1e-5
    assert truth.largest_singular_value(w) <= 1 + 1e-6
    # W is that of a matrix some units of TF32's 2^-10 away
    assert 1e-5 < truth.relative_error(w, truth.polar_factor(x)) <= 5e-3
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    expected = truth.derivative(grad, x)
    assert truth.relative_error(polar.polar_backward(grad, x, w, 10), expected) <= 5e-3
