"""block_conv: values and derivatives against convolutions in float64, registration, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lipfast
from lipfast import backends, reference
from lipfast.ops import block_conv
from lipfast.saved import saved_tensors

OP = torch.ops.lipfast.block_conv.default
F64 = torch.float64
BACKENDS = ["torch", "reference"]
SHAPES = [(k, 4, 6, 3) for k in (1, 2, 3, 4, 5, 7)]  # k, out, c, r
SHAPES += [(3, 5, 5, 2), (3, 1, 1, 0), (2, 3, 4, 4), (3, 1, 7, 3), (3, 8, 2, 1), (2, 2, 3, 5)]


def draw(k: int, out: int, c: int, r: int, *batch: int, dtype=F64) -> tuple[Tensor, Tensor]:
    """A factor and halves near the orthogonal, so that products stay near 1."""
    generator = torch.Generator().manual_seed(k * 100 + c)
    factor = torch.randn(*batch, out, c, dtype=F64, generator=generator) / c**0.5
    halves = torch.randn(*batch, 2 * (k - 1), c, r, dtype=F64, generator=generator) / c**0.5
    return factor.to(dtype).requires_grad_(), halves.to(dtype).requires_grad_()


def definition(factor: Tensor, halves: Tensor) -> Tensor:
    """The impulse response of the factor after its blocks, each one convolution of two taps."""
    if factor.dim() == 3:
        return torch.stack([definition(h, q) for h, q in zip(factor, halves, strict=True)])
    k, c = 1 + len(halves) // 2, factor.shape[1]
    impulses = torch.eye(c, dtype=factor.dtype)[:, :, None, None]
    x = F.pad(impulses, (k - 1, k - 1, k - 1, k - 1))
    for index in reversed(range(len(halves))):
        projector = halves[index] @ halves[index].T
        taps = torch.stack([projector, torch.eye(c, dtype=factor.dtype) - projector], 2)
        x = F.conv2d(x, taps[:, :, :, None] if index % 2 == 0 else taps[:, :, None, :])
    # an impulse meets the last tap first
    return F.conv2d(x, factor[:, :, None, None]).transpose(0, 1).flip((2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, batch, backend, poisoned_empty):
    factor, halves = draw(*shape, *batch)
    kernel = block_conv(factor, halves, backend=backend)
    expected = definition(factor, halves)
    assert kernel.is_contiguous()
    torch.testing.assert_close(kernel, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(kernel.shape, dtype=F64)
    ours = torch.autograd.grad(kernel, (factor, halves), grad, materialize_grads=True)
    theirs = torch.autograd.grad(expected, (factor, halves), grad, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [3, 6])
def test_is_orthogonal_at_every_frequency(k, rows):
    matrices = torch.linalg.qr(torch.randn(2 * k - 1, 6, 6, dtype=F64)).Q
    kernel = block_conv(matrices[0, :rows], matrices[1:, :, :3])
    values = torch.linalg.svdvals(reference.kernel_spectrum(kernel, (9, 8)))
    torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 16, 16, 8), (3, 64, 64, 32), (5, 24, 48, 24)])
def test_float32_is_as_exact_as_the_published_form(shape):
    exact_inputs = draw(*shape)
    exact = definition(*exact_inputs)
    grad = torch.randn(exact.shape, dtype=F64)
    exact = (exact, *torch.autograd.grad(exact, exact_inputs, grad))
    errors = {}
    for backend in BACKENDS:
        inputs = draw(*shape, dtype=torch.float32)
        kernel = block_conv(*inputs, backend=backend)
        values = (kernel, *torch.autograd.grad(kernel, inputs, grad.float()))
        errors[backend] = [
            ((a.double() - b).norm() / b.norm()).item() for a, b in zip(values, exact, strict=True)
        ]
    for ours, published in zip(*errors.values(), strict=True):
        assert ours < 2 * published + 1e-6


@pytest.mark.parametrize("shape", [(1, 2, 3, 1), (2, 3, 2, 1), (3, 2, 3, 2), (2, 2, 2, 1, 2)])
def test_derivatives_of_both_orders(shape):
    inputs = draw(*shape)
    assert torch.autograd.gradcheck(block_conv, inputs)
    assert torch.autograd.gradgradcheck(block_conv, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_computed_in_float32(dtype):
    factor, halves = draw(3, 5, 6, 3, dtype=dtype)
    kernel = block_conv(factor, halves)
    assert torch.equal(kernel, block_conv(factor.float(), halves.float()).to(dtype))
    kernel.sum().backward()
    assert factor.grad.dtype == halves.grad.dtype == dtype


def test_autocast_does_not_round():
    factor, halves = draw(3, 32, 32, 16, dtype=torch.float32)
    plain = block_conv(factor, halves)
    expected = torch.autograd.grad(plain.square().sum(), (factor, halves))
    for run in (block_conv, lambda f, q: OP(f[None], q[None])[0]):
        with torch.autocast("cpu", torch.bfloat16):
            kernel = run(factor, halves)
            ours = torch.autograd.grad(kernel.square().sum(), (factor, halves))
        assert torch.equal(kernel, plain)
        assert all(map(torch.equal, ours, expected))


def test_takes_any_memory_and_slices():
    matrices = torch.randn(5, 6, 6, dtype=F64)
    factor, halves = matrices[0, :4], matrices[1:, :, :3]
    expected = block_conv(factor.contiguous(), halves.contiguous())
    torch.testing.assert_close(block_conv(factor, halves), expected)
    torch.testing.assert_close(block_conv(factor.T.contiguous().T, halves), expected)
    leaf = matrices.clone().requires_grad_()
    kernel = block_conv(leaf[0, :4], leaf[1:, :, :3])
    grad = torch.randn(kernel.shape, dtype=F64).contiguous(memory_format=torch.channels_last)
    ours = torch.autograd.grad(kernel, leaf, grad, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(kernel, leaf, grad.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_compute(backend):
    for shape in [(3, 0, 4, 2), (3, 4, 0, 0), (2, 3, 4, 2, 0), (1, 3, 4, 0, 0)]:
        factor, halves = draw(*shape)
        kernel = block_conv(factor, halves, backend=backend)
        assert kernel.shape == (*shape[4:], *shape[1:3], shape[0], shape[0])
        kernel.sum().backward() if kernel.requires_grad else None


@pytest.mark.parametrize("shape", [(3, 4, 5, 2, 1), (1, 3, 4, 2, 2), (2, 3, 1, 0, 2)])
def test_registration(shape):
    torch.library.opcheck(OP, draw(*shape))
    torch.library.opcheck(OP, draw(*shape, dtype=torch.float32))


def test_fake_tensors_have_shape_and_dtype():
    with FakeTensorMode():
        inputs = torch.empty(4, 6, dtype=torch.bfloat16), torch.empty(4, 6, 3, dtype=torch.bfloat16)
        kernel = block_conv(*inputs)
        assert (kernel.shape, kernel.dtype) == ((4, 6, 3, 3), torch.bfloat16)
        kernel = OP(*(torch.empty(s, device="cuda") for s in ((2, 4, 6), (2, 2, 6, 3))))
        assert (kernel.device.type, kernel.shape) == ("cuda", (2, 4, 6, 2, 2))


def test_training_step_is_one_graph():
    def step(factor: Tensor, halves: Tensor) -> Tensor:
        return block_conv(factor, halves).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for c in (4, 6):
        inputs = draw(3, 4, c, c // 2)
        ours = torch.autograd.grad(compiled(*inputs), inputs)
        torch.testing.assert_close(ours, torch.autograd.grad(step(*inputs), inputs))


def test_keeps_nothing_but_its_arguments():
    factor, halves = draw(3, 8, 8, 4)
    known = {t.untyped_storage().data_ptr() for t in (factor, halves)}
    with saved_tensors() as saved:
        for run in (block_conv, lambda f, q: OP(f[None], q[None])):
            run(factor, halves)
    assert len(saved) == 4
    assert {t.untyped_storage().data_ptr() for t in saved} == known


def test_is_deterministic():
    factor, halves = draw(3, 48, 64, 32, dtype=torch.float32)
    runs = []
    for _ in range(3):
        kernel = block_conv(factor, halves)
        runs.append((kernel, *torch.autograd.grad(kernel.sum(), (factor, halves))))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_chooses_the_fast_path_and_obeys():
    inputs = draw(3, 4, 4, 2)
    assert backends.choose("block_conv", *inputs) == "torch"
    with lipfast.backend("reference"):
        torch.testing.assert_close(block_conv(*inputs), block_conv(*inputs, backend="torch"))

    def loss(factor: Tensor) -> Tensor:
        return block_conv(factor, inputs[1].detach()).square().sum()

    expected = torch.autograd.grad(loss(inputs[0]), inputs[0])[0]
    torch.testing.assert_close(torch.func.grad(loss)(inputs[0].detach()), expected)


def one(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([[1.0]], one(2, 1, 1)), TypeError, "factor must be a torch.Tensor, got list"),
        ((one(1, 1), None), TypeError, "halves must be a torch.Tensor, got NoneType"),
        ((one(1, 1, dtype=torch.int64), one(2, 1, 1)), TypeError, "of factor .* got torch.int64"),
        ((one(1, 1), one(2, 1, 1, dtype=F64)), TypeError, "halves must have the dtype torch.fl"),
        ((one(1, 1), one(2, 1, 1, device="meta")), ValueError, "on the device cpu .* got meta"),
        ((one(4), one(2, 4, 2)), ValueError, r"factor must have the shape .* got \(4,\)"),
        ((one(3, 4), one(3, 4, 2)), ValueError, r"\(an even number, 4, r\) .* got \(3, 4, 2\)"),
        ((one(3, 4), one(2, 3, 2)), ValueError, r"got \(2, 3, 2\)"),
        ((one(3, 4), one(1, 2, 4, 2)), ValueError, "halves must have the shape"),
        ((one(2, 3, 4), one(2, 4, 2)), ValueError, r"\(2, an even number, 4, r\)"),
        ((one(2, 3, 4), one(1, 2, 4, 2)), ValueError, r"\(2, an even number, 4, r\)"),
    ],
)
def test_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        block_conv(*arguments)


def test_refuses_other_backends():
    with pytest.raises(ValueError, match="has only the backends torch, reference"):
        block_conv(one(2, 2), one(2, 2, 1), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (3, 256, 256, 128)])
def test_gpu_equals_the_definition(shape, poisoned_empty):
    inputs = draw(*shape)
    expected = definition(*inputs)
    grad = torch.randn(expected.shape, dtype=F64)
    expected = (
        expected,
        *torch.autograd.grad(expected, inputs, grad, materialize_grads=True),
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (F64, 1e-12)):
        moved = [t.detach().to("cuda", dtype).requires_grad_() for t in inputs]
        kernel = block_conv(*moved)
        values = (kernel, *torch.autograd.grad(kernel, moved, grad.to("cuda", dtype)))
        for ours, theirs in zip(values, expected, strict=True):
            error = (ours.double().cpu() - theirs).norm()
            assert error <= tolerance * (theirs.norm() + 1)
