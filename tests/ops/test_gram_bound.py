"""gram_bound: values and derivatives, against the definition in float64."""

import math

import pytest
import torch
from torch import Tensor

from lipfast import backends
from lipfast.ops import gram_bound, gram_bound_cpp, gram_bound_gemm

SHAPES = [(1, 1, 1, 1), (1, 1, 3, 3), (3, 3, 3, 3), (17, 17, 3, 3), (5, 3, 3, 3), (3, 5, 2, 4)]
SHAPES += [(4, 4, 1, 7), (2, 3, 7, 1), (3, 2, 7, 7), (2, 2, 5, 6), (6, 4), (1, 5), (5, 1)]
SHAPES += [(2, 5, 3, 3, 3), (3, 4, 6), (1, 4, 4, 2, 2)]
NO_CPP = backends.cpp_can_run(torch.empty(0)) is not None
CPP = pytest.param("cpp", marks=pytest.mark.skipif(NO_CPP, reason="lipfast._C is not built"))


def definition(weight: Tensor, q: Tensor | None, axis: str, groups: int = 1) -> Tensor:
    """The definition, offset by offset; differentiable."""
    if weight.dim() % 2:
        ones = [None] * len(weight) if q is None else q
        rows = [definition(w, v, axis, groups) for w, v in zip(weight, ones, strict=True)]
        return torch.stack(rows)
    if groups > 1:
        parts = weight.chunk(groups)
        scales = [None] * groups if q is None else q.chunk(groups)
        return torch.cat([definition(w, v, axis) for w, v in zip(parts, scales, strict=True)])
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    equation = "oixy,ojxy->ij" if axis == "in" else "ioxy,joxy->ij"
    kh, kw = weight.shape[2:]
    total: Tensor | int = 0
    for dy in range(1 - kh, kh):
        for dx in range(1 - kw, kw):
            at = weight[:, :, max(0, -dy) : kh - max(0, dy), max(0, -dx) : kw - max(0, dx)]
            to = weight[:, :, max(0, dy) : kh + min(0, dy), max(0, dx) : kw + min(0, dx)]
            total = total + torch.einsum(equation, at, to).abs()
    assert isinstance(total, Tensor)
    return total.sum(dim=1) if q is None else total @ q / q


def draw(
    shape: tuple[int, ...], axis: str, *, groups: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, q and dL/dr in float64; weight and q require gradients."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    first = len(shape) % 2
    channels = shape[first] if axis == "out" else shape[first + 1] * groups
    rows = (*shape[:first], channels)
    q = torch.rand(rows, dtype=torch.float64, generator=generator) + 0.5
    grad = torch.randn(rows, dtype=torch.float64, generator=generator)
    return weight.requires_grad_(), q.requires_grad_(), grad


def take_path(path: str, monkeypatch) -> None:
    for module in (gram_bound_cpp, gram_bound_gemm):
        for name in ("_ONE_PRODUCT_FORWARD", "_ONE_PRODUCT_BACKWARD"):
            monkeypatch.setattr(module, name, 10**9 if path == "one product" else 0)
    limit = 10**9 if path == "a product for each row" else 0
    monkeypatch.setattr(gram_bound_cpp, "_ROW_PRODUCTS_FORWARD", limit)


@pytest.fixture(params=["one product", "a product for each row", "products in place"])
def path(request, monkeypatch):
    take_path(request.param, monkeypatch)


def ways(*names: str) -> list:
    """Each way in which one of these backends computes."""
    paths = {"cpp": ["one product", "a product for each row", "products in place"]}
    paths |= {"torch": ["one product", "products in place"], "reference": ["published"]}
    marks = {"cpp": CPP.marks}
    return [
        pytest.param((name, path), id=f"{name}, {path}", marks=marks.get(name, ()))
        for name in names
        for path in paths[name]
    ]


@pytest.fixture(params=ways("cpp", "torch", "reference"))
def backend(request, monkeypatch):
    name, path = request.param
    take_path(path, monkeypatch)
    return name


@pytest.mark.parametrize("with_q", [False, True])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, axis, with_q, backend, poisoned_empty):
    weight, q, grad = draw(shape, axis)
    inputs = (weight, q) if with_q else (weight,)
    scale = q if with_q else None
    expected = definition(weight, scale, axis)
    r = gram_bound(weight, scale, axis=axis, backend=backend)
    torch.testing.assert_close(r, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(r, inputs, grad)
    theirs = torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((6, 2, 3, 3), 3), ((4, 1, 3, 2), 4), ((6, 4), 2), ((2, 4, 3, 2, 2), 2)]
)
def test_groups_do_not_meet(shape, groups, axis, backend, poisoned_empty):
    weight, q, grad = draw(shape, axis, groups=groups)
    r = gram_bound(weight, q, axis=axis, groups=groups, backend=backend)
    expected = definition(weight, q, axis, groups)
    torch.testing.assert_close(r, expected)
    torch.testing.assert_close(
        torch.autograd.grad(r, (weight, q), grad), torch.autograd.grad(expected, (weight, q), grad)
    )


@pytest.mark.parametrize("backend", ways("cpp", "torch"), indirect=True)
@pytest.mark.parametrize("shape", [(16, 16, 3, 3), (64, 64, 3, 3), (20, 48, 5, 3), (96, 80)])
def test_float32_is_as_exact_as_the_published_form(shape, backend):
    weight, q, grad = draw(shape, "in")
    exact = definition(weight, q, "in")
    exact_grad = torch.autograd.grad(exact, (weight, q), grad)
    errors = {}
    for name in (backend, "reference"):
        w, v = (t.detach().float().requires_grad_() for t in (weight, q))
        r = gram_bound(w, v, backend=name)
        values = (r, *torch.autograd.grad(r, (w, v), grad.float()))
        pairs = zip(values, (exact, *exact_grad), strict=True)
        errors[name] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    for ours, published in zip(errors[backend], errors["reference"], strict=True):
        assert ours < 2 * published + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_computed_in_float32(dtype):
    weight, q, grad = (t.detach().to(dtype) for t in draw((5, 4, 3, 3), "in"))
    weight.requires_grad_()
    r = gram_bound(weight, q)
    assert r.dtype == dtype
    assert torch.equal(r, gram_bound(weight.float(), q.float()).to(dtype))
    assert torch.autograd.grad(r, weight, grad)[0].dtype == dtype


def test_autocast_does_not_round_the_weight():
    weight, q, grad = (t.detach().float() for t in draw((40, 40, 3, 3), "in"))
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        r = gram_bound(weight, q)
    (out,) = torch.autograd.grad(r, weight, grad)
    plain = gram_bound(weight, q)
    assert torch.equal(r, plain)
    assert torch.equal(out, torch.autograd.grad(plain, weight, grad)[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_any_memory_format(memory_format, axis):
    weight, q, _ = draw((5, 4, 3, 3), axis)
    other = weight.detach().to(memory_format=memory_format).requires_grad_()
    ours = torch.autograd.grad(gram_bound(other, q, axis=axis).sum(), other)
    expected = torch.autograd.grad(definition(weight, q, axis).sum(), weight)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (3, 0, 3, 3), (0, 2, 3, 3, 3), (2, 0, 4), (0, 0)])
@pytest.mark.parametrize("axis", ["in", "out"])
def test_no_channels(shape, axis):
    weight, q, grad = draw(shape, axis)
    r = gram_bound(weight, q, axis=axis)
    assert not r.any()
    assert all(not g.any() for g in torch.autograd.grad(r, (weight, q), grad))


def test_zero_filters_have_no_gradient(path):
    weight = torch.randn(6, 5, 3, 3)
    weight[:, 2] = 0
    weight.requires_grad_()
    r = gram_bound(weight)
    (grad,) = torch.autograd.grad(r.sum(), weight)
    assert r[2] == 0
    assert not grad[:, 2].any()
    assert not torch.autograd.grad(gram_bound(weight * 0).sum(), weight)[0].any()


@pytest.mark.parametrize("ratio", [1e-24, 1e-12, 1e12, 1e24])
def test_unequal_q_stay_finite(ratio, path):
    weight, _, grad = draw((4, 3, 3, 3), "in")
    q = torch.tensor([1.0, ratio, ratio**0.5], dtype=torch.float64, requires_grad=True)
    r = gram_bound(weight, q)
    expected = definition(weight, q, "in")
    torch.testing.assert_close(r, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(r, (weight, q), grad)
    theirs = torch.autograd.grad(expected, (weight, q), grad)
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 2, 1), (2, 2, 2, 1, 2), (4, 3)])
def test_gradcheck(shape, axis, path):
    weight, q, _ = draw(shape, axis)
    assert torch.autograd.gradcheck(lambda w, v: gram_bound(w, v, axis=axis), (weight, q))
    assert torch.autograd.gradcheck(lambda w: gram_bound(w, axis=axis), weight)


def test_gradient_of_one_input_only():
    weight, q, grad = draw((3, 4, 3, 3), "in")
    both = torch.autograd.grad(gram_bound(weight, q), (weight, q), grad)
    (only_q,) = torch.autograd.grad(gram_bound(weight.detach(), q), q, grad)
    (only_weight,) = torch.autograd.grad(gram_bound(weight, q.detach()), weight, grad)
    assert torch.equal(only_weight, both[0])
    assert torch.equal(only_q, both[1])


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("registered", [False, True])
def test_second_derivative(axis, registered):
    weight, q, grad = draw((2, 3, 3, 3), axis)

    def function(weight, q):
        if registered:
            return torch.ops.lipfast.gram_bound(weight, q, axis, 1, "torch")[0]
        return gram_bound(weight, q, axis=axis)

    assert torch.autograd.gradgradcheck(function, (weight, q), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda w: function(w, q.detach()), weight, fast_mode=True)
    r = function(weight, q)
    plain = torch.autograd.grad(r, (weight, q), grad, retain_graph=True)
    again = torch.autograd.grad(r, (weight, q), grad, create_graph=True)
    torch.testing.assert_close(again, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("shape", [*SHAPES, (130, 130, 3, 3), (256, 192, 3, 3)])
def test_gpu_equals_the_definition(shape, axis, backend, poisoned_empty):
    weight, q, grad = draw(shape, axis)
    expected = definition(weight, q, axis)
    expected = (expected, *torch.autograd.grad(expected, (weight, q), grad))
    dtypes = [torch.float32] if backend == "triton" else [torch.float32, torch.float64]
    for dtype in dtypes:
        w, v, g = (t.detach().to("cuda", dtype) for t in (weight, q, grad))
        w.requires_grad_(), v.requires_grad_()
        runs = []
        for _ in range(2):
            r = gram_bound(w, v, axis=axis, backend=backend)
            runs.append((r, *torch.autograd.grad(r, (w, v), g)))
        assert all(map(torch.equal, *runs))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        scale = expected[0].max().item()
        for ours, theirs in zip(runs[0], expected, strict=True):
            error = (ours.double().cpu() - theirs).norm()
            assert error <= tolerance * (theirs.norm() + scale * math.sqrt(theirs.numel()))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gpu_follows_the_setting_for_tf32(backend):
    weight = torch.randn(256, 256, 3, 3, device="cuda")
    exact = gram_bound(weight.double(), backend="torch")
    errors = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            r = gram_bound(weight, backend=backend).double()
            errors[precision] = ((r - exact).norm() / exact.norm()).item()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert errors["highest"] < 1e-6
    assert errors["high"] < 2**-10
