"""skew_exp on the CPU: values, derivatives, what is saved, one graph."""

import itertools

import pytest
import torch
from skew_exp_cases import F64, T4, U5, arguments, gradients
from torch import Tensor

from lipfast import reference
from lipfast.ops import skew_exp
from lipfast.saved import saved_bytes

OP = torch.ops.lipfast.skew_exp.default
SHAPES = [(2, 3, 4, 5), (3, 4, 1, 1), (1, 2, 2, 6), (5, 1, 3, 3)]


@pytest.fixture
def registered(monkeypatch):
    """Let save="terms" run the registered op too, as on a GPU: a CPU takes the composed form."""

    def stacked(x, kernel, coefficients, padding_mode):
        return OP(x, kernel, coefficients, padding_mode, True, "torch", kernel.dtype)[0]

    monkeypatch.setitem(skew_exp.__globals__, "_composed", stacked)


def dense_operator(kernel: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    n = kernel.shape[1] * size[0] * size[1]
    basis = torch.eye(n, dtype=F64).reshape(n, -1, *size)
    return reference.conv2d_same(basis, kernel, None, mode).flatten(1).T


@pytest.mark.parametrize("save", ["terms", "input"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_is_the_polynomial_of_the_dense_operator(k, mode, save, registered):
    for shape, coefficients in itertools.product(SHAPES, (U5, T4, (0.5, -2.0))):
        x, kernel = arguments(shape, k)
        with torch.no_grad():
            y = skew_exp(x, kernel, coefficients, mode, save=save)
            operator = dense_operator(kernel, shape[2:], mode)
        torch.testing.assert_close(operator.T, -operator)
        polynomial = sum(
            a * torch.linalg.matrix_power(operator, i) for i, a in enumerate(coefficients)
        )
        expected = (x.detach().flatten(1) @ polynomial.T).reshape(shape)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)


def test_many_taylor_terms_are_the_matrix_exponential():
    x, kernel = arguments()
    y = skew_exp(x, kernel, reference.taylor_coefficients(25), "zeros")
    operator = dense_operator(kernel.detach(), (4, 5), "zeros")
    expected = x.detach().flatten(1) @ torch.linalg.matrix_exp(operator).T
    torch.testing.assert_close(y.detach().flatten(1), expected)


@pytest.mark.parametrize("save", ["terms", "input"])
@pytest.mark.parametrize(("mode", "k"), [("zeros", 3), ("circular", 3), ("zeros", 1)])
def test_first_and_second_derivative(mode, k, save, registered):
    for shape in [(2, 3, 3, 4), (1, 2, 1, 1)]:
        x, _ = arguments(shape, k)
        weight = torch.randn(shape[1], shape[1], k, k, dtype=F64, requires_grad=True)

        def function(x: Tensor, weight: Tensor) -> Tensor:
            return skew_exp(x, 0.3 * reference.skew_kernel(weight), U5, mode, save=save)

        assert torch.autograd.gradcheck(function, (x, weight), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, weight), fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "kernel", "both"])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_both_ways_to_save_give_the_same_gradients(mode, wanted, registered):
    for dtype, tolerance in ((F64, 1e-14), (torch.float32, 1e-6)):
        for shape, k in itertools.product(SHAPES, (3, 5)):
            inputs = arguments(shape, k, dtype=dtype)
            chosen = [t for t, name in zip(inputs, ("x", "kernel"), strict=True)]
            for tensor, name in zip(inputs, ("x", "kernel"), strict=True):
                tensor.requires_grad_(wanted in (name, "both"))
            chosen = [t for t in inputs if t.requires_grad]
            results = []
            for options in ({"save": "terms"}, {"save": "input"}, {"backend": "reference"}):
                y = skew_exp(*inputs, U5, mode, **options)
                grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
                results.append([y, *torch.autograd.grad(y, chosen, grad.to(dtype))])
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert float((a - b).norm()) <= tolerance * float(a.norm()) * 5 + 1e-30


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("save", ["terms", "input"])
def test_is_as_near_to_float64_as_the_plain_sum(save, layout, dtype, registered, poisoned_empty):
    for shape, k in [((2, 8, 6, 7), 3), ((3, 5, 1, 1), 3), ((4, 6, 2, 9), 1)]:
        inputs = arguments(shape, k, dtype=dtype)
        x = inputs[0].detach().contiguous(memory_format=layout).requires_grad_()
        inputs = (x, inputs[1])
        wide = tuple(t.detach().double().requires_grad_() for t in inputs)
        exact = gradients(reference.skew_polynomial, wide, U5, "circular")
        ours = gradients(skew_exp, inputs, U5, "circular", save=save)
        theirs = gradients(reference.skew_polynomial, inputs, U5, "circular")
        assert ours[0].stride() == x.stride()
        assert ours[1].stride() == x.stride()
        for a, b, c in zip(exact, ours, theirs, strict=True):
            assert b.dtype == dtype
            error, other = (float((value.double() - a).norm()) for value in (b, c))
            assert error <= 2 * other + 8 * torch.finfo(dtype).eps * float(a.detach().norm())


@pytest.mark.parametrize("save", ["terms", "input"])
def test_strided_input_expanded_gradient_and_empty_batch(save, registered):
    x, kernel = arguments()
    strided = torch.stack([x.detach()] * 2, dim=-1)[..., 0].requires_grad_()
    ours = torch.autograd.grad(
        skew_exp(strided, kernel, U5, "zeros", save=save).sum(), [strided, kernel]
    )
    theirs = torch.autograd.grad(
        reference.skew_polynomial(x, kernel, U5, "zeros").sum(), [x, kernel]
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for mode, k in itertools.product(("zeros", "circular"), (1, 3)):
        y, *grads = gradients(skew_exp, arguments((0, 3, 4, 5), k), U5, mode, save=save)
        assert y.shape == (0, 3, 4, 5)
        assert not any(bool(g.any()) for g in grads)


def test_what_is_saved(registered):
    x, kernel = arguments((4, 6, 8, 8), dtype=torch.float32)
    assert saved_bytes(lambda: skew_exp(x, kernel, U5, save="input"), x, kernel) == 0
    assert saved_bytes(lambda: skew_exp(x, kernel, U5), kernel) == 5 * x.nbytes
    assert saved_bytes(lambda: skew_exp(x, kernel, U5, backend="reference"), kernel) >= 5 * x.nbytes
    frozen = kernel.detach()
    assert saved_bytes(lambda: skew_exp(x, frozen, U5, save="input"), x, frozen) == 0


@pytest.mark.parametrize("save", ["terms", "input"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_convolves_in_bfloat16_and_keeps_dtypes(x_dtype, k, save):
    x, kernel = arguments((4, 8, 6, 6), k, dtype=torch.float32)
    inputs = (x.detach().to(x_dtype).requires_grad_(), kernel)
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact = gradients(skew_exp, wide, U5, "zeros")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(skew_exp, inputs, U5, "zeros", save=save)
        torch.testing.assert_close(skew_exp(*wide, U5, "zeros", save=save), exact[0])
    assert [t.dtype for t in ours] == [x_dtype, x_dtype, torch.float32]
    errors = [float((a - b.double()).norm() / a.norm()) for a, b in zip(exact, ours, strict=True)]
    assert max(errors) < 0.02
    assert errors[0] > 1e-6  # the convolutions are not those of float32


@pytest.mark.parametrize("save", ["terms", "input"])
def test_training_step_is_one_graph(save, registered):
    torch.compiler.reset()
    inputs = arguments((2, 4, 3, 5), dtype=torch.float32)

    def step(x: Tensor, kernel: Tensor) -> Tensor:
        return skew_exp(x, kernel, U5, "circular", save=save).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, theirs = (gradients(function, inputs) for function in (compiled, step))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_torch_func_takes_the_plain_sum():
    x, kernel = (t.detach() for t in arguments())
    jacobian = torch.func.jacrev(lambda x: skew_exp(x, kernel, U5))(x)
    expected = torch.autograd.functional.jacobian(lambda x: skew_exp(x, kernel, U5), x)
    torch.testing.assert_close(jacobian, expected)
    with pytest.raises(ValueError, match=r"'torch' cannot run: the transforms of torch\.func"):
        torch.func.vmap(lambda x: skew_exp(x, kernel, U5, backend="torch"))(x[None])


def test_is_deterministic_and_leaves_its_arguments_alone(registered):
    inputs = arguments((4, 8, 9, 9), dtype=torch.float32)
    before = [t.detach().clone() for t in inputs]
    for save in ("terms", "input"):
        first, again = (gradients(skew_exp, inputs, U5, "zeros", save=save) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("save", ["terms", "input"])
def test_gpu_equals_the_plain_sum_in_float64(save, mode, layout):
    x, kernel = (t.detach().cuda() for t in arguments((4, 8, 9, 7)))
    inputs = (x.contiguous(memory_format=layout).requires_grad_(), kernel.requires_grad_())
    grad = torch.randn_like(x)
    options = ({"save": save}, {"backend": "reference"})
    values = [skew_exp(*inputs, U5, mode, **option) for option in options]
    ours, theirs = ([y, *torch.autograd.grad(y, inputs, grad)] for y in values)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
