"""aol_rescale: values, derivatives, memory formats, registration, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast import backends
from lipfast.ops import aol_rescale

OP = torch.ops.lipfast.aol_rescale.default
BACKWARD_OP = torch.ops.lipfast.aol_rescale_backward.default
SHAPES = [((1, 1, 1, 1), 1), ((5, 3, 3, 3), 1), ((6, 2, 3, 2), 3), ((4, 7), 2), ((3, 4, 5), 1)]
SHAPES += [((2, 6, 2, 1, 7), 3), ((4, 1, 3, 3), 4), ((17, 33, 3, 3), 1), ((3, 130, 1, 1), 1)]
NO_CPP = backends.cpp_can_run(torch.empty(0)) is not None
CPP = pytest.param("cpp", marks=pytest.mark.skipif(NO_CPP, reason="lipfast._C is not built"))
BACKENDS = [CPP, "torch", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(shape: tuple[int, ...], groups: int = 1, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight and r in float64, both with gradients."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    first = len(shape) % 2
    rows = (*shape[:first], shape[first + 1] * groups)
    r = torch.rand(rows, dtype=torch.float64, generator=generator) + 0.5
    return weight.requires_grad_(), r.requires_grad_()


def definition(weight: Tensor, r: Tensor, groups: int) -> Tensor:
    """Input channel by input channel."""
    if weight.dim() % 2:
        pairs = zip(weight, r, strict=True)
        return torch.stack([definition(w, rows, groups) for w, rows in pairs])
    parts = zip(weight.chunk(groups), r.chunk(groups), strict=True)
    scaled = [
        torch.stack([w[:, i] / rows[i].sqrt() for i in range(w.shape[1])], dim=1)
        for w, rows in parts
    ]
    return torch.cat(scaled)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.movedim(-3, -1).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_equals_the_definition(shape, groups, channels_last, backend, poisoned_empty):
    weight, r = draw(shape, groups)
    out = aol_rescale(weight, r, groups=groups, channels_last=channels_last, backend=backend)
    expected = definition(weight, r, groups)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=0)
    assert out.is_contiguous() or (channels_last and is_channels_last(out))
    assert not channels_last or len(shape) < 4 or is_channels_last(out)
    grad = torch.randn(shape, dtype=torch.float64)
    ours = torch.autograd.grad(out, (weight, r), grad)
    theirs = torch.autograd.grad(expected, (weight, r), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES[:2])
def test_casts_once(weight_dtype, dtype, backend):
    if (backend, dtype) == ("cpp", torch.float16):
        pytest.skip("cpp has no float16")
    weight, r = (t.detach().to(weight_dtype).requires_grad_() for t in draw((9, 6, 3, 3)))
    out = aol_rescale(weight, r, dtype=dtype, channels_last=True, backend=backend)
    assert out.dtype == dtype
    exact = definition(weight.detach().double(), r.detach().double(), 1)
    epsilon = max(torch.finfo(dtype).eps / 2, 4 * torch.finfo(weight_dtype).eps)
    error = (out.detach().double() - exact).abs()
    assert (error <= epsilon * (1 + 2**-7) * exact.abs()).all()
    grad = torch.randn(9, 6, 3, 3).to(dtype)
    ours = torch.autograd.grad(out, (weight, r), grad)
    double = (weight.detach().double().requires_grad_(), r.detach().double().requires_grad_())
    theirs = torch.autograd.grad(definition(*double, 1), double, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == weight_dtype
        assert (a - b).norm() <= 8 * torch.finfo(weight_dtype).eps * b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_zero_without_a_bound(backend):
    weight, r = draw((4, 5, 3, 3))
    with torch.no_grad():
        r[1], r[3] = 0, -1
    out = aol_rescale(weight, r, backend=backend)
    grads = torch.autograd.grad(out, (weight, r), torch.ones_like(out))
    for tensor in (out, grads[0]):
        assert tensor.isfinite().all()
        assert not tensor[:, [1, 3]].any()
        assert tensor[:, [0, 2, 4]].all()
    assert torch.equal(grads[1] == 0, torch.tensor([False, True, False, True, False]))


@pytest.mark.parametrize(
    "grad",
    [
        torch.randn(5, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last),
        torch.randn(3, 3, 4, 5, dtype=torch.float64).permute(3, 2, 0, 1),
        torch.ones((), dtype=torch.float64).expand(5, 4, 3, 3),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_memory_of_weight_and_gradient(backend, memory_format, grad):
    weight, r = draw((5, 4, 3, 3))
    other = weight.detach().to(memory_format=memory_format).requires_grad_()
    ours = torch.autograd.grad(aol_rescale(other, r, backend=backend), (other, r), grad)
    theirs = torch.autograd.grad(definition(weight, r, 1), (weight, r), grad)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (3, 0, 3, 3), (0, 2, 3, 3, 3), (2, 0, 4), (0, 0)])
def test_no_channels(shape):
    weight, r = draw(shape)
    out = aol_rescale(weight, r, channels_last=True)
    assert out.shape == shape
    grads = torch.autograd.grad(out, (weight, r), torch.ones_like(out))
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize(("shape", "groups"), SHAPES[:6])
def test_gradcheck(shape, groups):
    weight, r = draw(shape, groups)
    function = lambda w, rows: aol_rescale(w, rows, groups=groups, channels_last=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, (weight, r))


@pytest.mark.parametrize(("shape", "groups"), SHAPES[:4])
@pytest.mark.parametrize("registered", [False, True])
def test_second_derivative(shape, groups, registered):
    weight, r = draw(shape, groups)

    def function(w, rows):
        if registered:
            return torch.ops.lipfast.aol_rescale(w, rows, groups, w.dtype, False, "torch")
        return aol_rescale(w, rows, groups=groups)

    assert torch.autograd.gradgradcheck(function, (weight, r))
    plain = torch.autograd.grad(function(weight, r).sum(), (weight, r))
    again = torch.autograd.grad(function(weight, r).sum(), (weight, r), create_graph=True)
    torch.testing.assert_close(again, plain)


def test_a_second_derivative_does_not_count_r_of_the_weight_twice():
    weight, _ = draw((3, 4))
    function = lambda w: aol_rescale(w, 1 + w.square().sum(dim=0))  # noqa: E731
    assert torch.autograd.gradgradcheck(function, weight)


@pytest.mark.parametrize("backend", [CPP, "torch"])
@pytest.mark.parametrize(("shape", "groups"), [SHAPES[2], SHAPES[3], ((0, 3, 3, 3), 1)])
def test_registration(shape, groups, backend):
    weight, r = draw(shape, groups)
    torch.library.opcheck(OP, (weight, r, groups, torch.float64, True, backend))
    single = [t.detach().float().requires_grad_() for t in (weight, r)]
    torch.library.opcheck(OP, (*single, groups, torch.bfloat16, False, backend))
    arguments = (torch.ones_like(weight), weight.detach(), r.detach(), groups, backend)
    torch.library.opcheck(BACKWARD_OP, arguments)


def test_fake_tensors_have_shape_dtype_and_strides():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight, r = torch.empty(5, 4, 3, 3), torch.empty(4)
        out = aol_rescale(weight, r, dtype=torch.bfloat16, channels_last=True)
        assert (out.shape, out.dtype) == ((5, 4, 3, 3), torch.bfloat16)
        assert out.is_contiguous(memory_format=torch.channels_last)
        on_gpu = torch.empty(5, 4, 3, 3, device="cuda"), torch.empty(4, device="cuda")
        assert OP(*on_gpu, 1, torch.float16, False, "triton").device.type == "cuda"


def test_training_step_is_one_graph():
    def step(weight: Tensor, r: Tensor) -> Tensor:
        return aol_rescale(weight, r, dtype=torch.bfloat16, channels_last=True).float().square()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    weight, r = (t.detach().float().requires_grad_() for t in draw((3, 4, 3, 3)))
    ours, theirs = compiled(weight, r), step(weight, r)
    assert torch.equal(ours, theirs)
    pairs = [torch.autograd.grad(y.sum(), (weight, r)) for y in (ours, theirs)]
    torch.testing.assert_close(*pairs)


def test_is_deterministic():
    weight, r = (t.detach().float().requires_grad_() for t in draw((64, 48, 3, 3)))
    runs = []
    for _ in range(3):
        out = aol_rescale(weight, r, dtype=torch.bfloat16, channels_last=True)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), (weight, r))))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@pytest.mark.skipif(NO_CPP, reason="lipfast._C is not built")
def test_rounds_to_bfloat16_as_torch_does():
    weight = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1e-40])
    out = aol_rescale(weight[None], torch.ones(7), dtype=torch.bfloat16, backend="cpp")
    torch.testing.assert_close(out[0], weight.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_chooses_the_fast_path_and_obeys():
    weight, r = (t.detach() for t in draw((3, 4, 3, 3)))
    assert backends.choose("aol_rescale", weight, torch.float16) == "torch"
    chosen = backends.choose("aol_rescale", weight, torch.bfloat16)
    assert chosen == ("torch" if NO_CPP else "cpp")
    with lipfast.backend("reference"):
        torch.testing.assert_close(aol_rescale(weight, r), aol_rescale(weight, r, backend="torch"))


def one(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD_INPUTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: aol_rescale([[1.0]], one(1)), TypeError, "weight must be a torch.Tensor, got list"),
    (lambda: aol_rescale(one(2, 2), 1.0), TypeError, "r must be a torch.Tensor, got float"),
    (
        lambda: aol_rescale(one(2, 2, dtype=torch.float16), one(2, dtype=torch.float16)),
        TypeError,
        "dtype of weight must be torch.float64 or torch.float32, got torch.float16",
    ),
    (lambda: aol_rescale(one(2, 2), one(2).double()), TypeError, "r must have the dtype"),
    (lambda: aol_rescale(one(2, 2), one(2), dtype=torch.int8), TypeError, "dtype must be one of"),
    (lambda: aol_rescale(one(4), one(4)), ValueError, r"weight must have the shape .* got \(4,\)"),
    (lambda: aol_rescale(one(3, 2), one(4), groups=2), ValueError, "must divide the 3 output"),
    (lambda: aol_rescale(one(3, 2), one(2), groups=1.0), ValueError, "must divide .* got 1.0"),
    (lambda: aol_rescale(one(3, 2), one(3)), ValueError, r"r must have the shape \(2,\), got"),
    (lambda: aol_rescale(one(2, 2), torch.ones(2, device="meta")), ValueError, "device cpu of"),
    (
        lambda: aol_rescale(one(2, 2), one(2), dtype=torch.float16, backend="cpp"),
        ValueError,
        "'cpp' cannot run: it has no float16",
    ),
    (lambda: aol_rescale(one(2, 2), one(2), backend="cuda"), ValueError, "'cuda' cannot run"),
    (
        lambda: aol_rescale(one(2, 2).double(), one(2).double(), backend="triton"),
        ValueError,
        "it computes in float32",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_INPUTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "torch"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [*SHAPES, ((130, 70, 3, 3), 1)])
def test_gpu_equals_the_definition(shape, groups, channels_last, dtype, backend, poisoned_empty):
    weight, r = draw(shape, groups)
    expected = definition(weight, r, groups)
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    theirs = (expected, *torch.autograd.grad(expected, (weight, r), grad.double()))
    single = [t.detach().to("cuda", torch.float32).requires_grad_() for t in (weight, r)]
    out = aol_rescale(
        *single, groups=groups, dtype=dtype, channels_last=channels_last, backend=backend
    )
    ours = (out, *torch.autograd.grad(out, single, grad.cuda()))
    for value, exact, kind in zip(ours, theirs, (dtype, *DTYPES[1:2] * 2), strict=True):
        tolerance = torch.finfo(kind).eps + 1e-6
        assert (value.double().cpu() - exact).norm() <= tolerance * exact.norm()
