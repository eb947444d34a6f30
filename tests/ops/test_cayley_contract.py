"""cayley: registration, memory, determinism, choice of backend, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lipfast
from lipfast import backends
from lipfast.ops import cayley
from lipfast.saved import saved_tensors

OPS = torch.ops.lipfast


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (2, 5, 3), (2, 2, 3, 5), (0, 4, 4)])
def test_registration(shape):
    planar = len(shape) == 4
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    backend = backends.choose("cayley", matrix)
    torch.library.opcheck(OPS.cayley.default, (matrix, planar, backend))
    out = OPS.cayley(matrix, planar, backend).detach()
    other = None if shape[-1] == shape[-2] else matrix.detach()
    arguments = (torch.randn_like(out), other, out, planar, backend)
    torch.library.opcheck(OPS.cayley_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_step_is_one_graph(dynamic):
    def step(matrix: Tensor) -> Tensor:
        return (cayley(matrix * 2, planar=True) + 1).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in [(3, 2, 4, 4), (2, 2, 5, 3), (4, 2, 6, 3)]:
        matrix = torch.randn(shape, requires_grad=True)
        ours = torch.autograd.grad(compiled(matrix), matrix)
        torch.testing.assert_close(ours, torch.autograd.grad(step(matrix), matrix))


def test_fake_tensors_have_shape_and_dtype():
    with FakeTensorMode():
        out = cayley(torch.empty(5, 2, 4, 3, device="cuda"), planar=True)
        assert (out.shape, out.dtype, out.device.type) == ((5, 2, 4, 3), torch.float32, "cuda")
        assert cayley(torch.empty(5, 4, dtype=torch.complex64)).dtype == torch.complex64


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (3, 2, 8, 5), (3, 2, 5, 8)])
def test_saves_the_result_and_no_square_matrix(shape):
    matrix = torch.randn(shape, requires_grad=True)
    with saved_tensors() as saved:
        out = cayley(matrix, planar=True)
    known = {out.data_ptr()} if shape[-1] == shape[-2] else {out.data_ptr(), matrix.data_ptr()}
    assert {t.data_ptr() for t in saved} == known


def test_is_deterministic():
    matrix = torch.randn(6, 2, 33, 33, requires_grad=True)
    runs = []
    for _ in range(4):
        out = cayley(matrix, planar=True)
        runs.append((out, *torch.autograd.grad(out.sum(), matrix)))
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_derivatives_by_torch_func():
    matrix = torch.randn(2, 4, 4, dtype=torch.float64)
    ours = torch.func.grad(lambda m: cayley(m).square().cos().sum())(matrix)
    matrix.requires_grad_()
    (expected,) = torch.autograd.grad(cayley(matrix).square().cos().sum(), matrix)
    torch.testing.assert_close(ours, expected)


def test_chooses_the_fast_path_and_obeys():
    matrix = torch.randn(2, 4, 4)
    assert backends.choose("cayley", matrix) != "reference"
    with lipfast.backend("reference"):
        out = cayley(matrix)
    torch.testing.assert_close(out, cayley(matrix, backend="torch"))


def one(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD_INPUTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: cayley([[1.0]]), TypeError, "matrix must be a torch.Tensor, got list"),
    (lambda: cayley(one(2, 2, dtype=torch.bfloat16)), TypeError, "got torch.bfloat16"),
    (
        lambda: cayley(one(2, 2, 2, dtype=torch.complex64), planar=True),
        TypeError,
        "one of torch.float64, torch.float32, got torch.complex64",
    ),
    (lambda: cayley(one(2)), ValueError, r"matrix must have the shape .* got \(2,\)"),
    (lambda: cayley(one(3, 4, 4), planar=True), ValueError, r"planar matrix .* got \(3, 4, 4\)"),
    (lambda: cayley(one(2, 2), planar=True), ValueError, r"planar matrix .* got \(2, 2\)"),
    (lambda: cayley(one(2, 2), backend="triton"), ValueError, "has only the backends"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_INPUTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
