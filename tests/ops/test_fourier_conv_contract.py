"""fourier_conv and kernel_spectrum: registration, tables, memory, choice of backend, refusals."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import lipfast
from lipfast import backends
from lipfast.ops import (
    cayley,
    fourier_conv,
    fourier_conv_dft,
    fourier_conv_spectrum,
    kernel_spectrum,
)
from lipfast.saved import saved_tensors

OPS = torch.ops.lipfast


def draw(h: int, w: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and kernel; with gradients."""
    x = torch.randn(2, 3, h, w, dtype=dtype)
    return x.requires_grad_(), torch.randn(4, 3, 3, 3, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(("h", "w"), [(1, 1), (4, 5), (12, 10), (113, 3)])
def test_registration(h, w):
    x, kernel = draw(h, w)
    torch.library.opcheck(OPS.kernel_spectrum.default, (kernel, h, w))
    spectrum = kernel_spectrum(kernel, (h, w)).detach().requires_grad_()
    torch.library.opcheck(OPS.kernel_spectrum_adjoint.default, (spectrum, 3, 3, h, w))
    torch.library.opcheck(OPS.fourier_conv.default, (x, spectrum, "torch"))
    y, x_hat = (t.detach() for t in OPS.fourier_conv(x, spectrum, "torch"))
    torch.library.opcheck(OPS.fourier_conv_backward.default, (y, x_hat, spectrum.detach(), "torch"))
    torch.library.opcheck(OPS.fourier_transform.default, (x,))
    torch.library.opcheck(OPS.fourier_inverse.default, (x_hat.requires_grad_(), h, w))


def step(x: Tensor, kernel: Tensor) -> Tensor:
    return fourier_conv(x, kernel_spectrum(kernel, (x.shape[2], x.shape[3]))).square().sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_training_step_is_one_graph(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (4, 11):
        inputs = draw(size, size + 1, torch.float32)
        ours = torch.autograd.grad(compiled(*inputs), inputs)
        torch.testing.assert_close(ours, torch.autograd.grad(step(*inputs), inputs))


def test_cayley_layer_compiles_without_complex_numbers():
    def step(x: Tensor, kernel: Tensor) -> Tensor:
        orthogonal = cayley(kernel_spectrum(kernel, (4, 5)), planar=True)
        return fourier_conv(x, orthogonal).square().sum()

    torch.compiler.reset()
    inputs = draw(4, 5, torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*complex.*")
        ours = torch.autograd.grad(torch.compile(step, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(step(*inputs), inputs))


def clear_tables() -> None:
    for table in (fourier_conv_dft._table, fourier_conv_dft._axis_tables, fourier_conv_dft._scale):
        table.cache_clear()
    fourier_conv_spectrum._table.cache_clear()


@pytest.mark.parametrize(("h", "w"), [(4, 5), (12, 10), (113, 3)])
def test_tables_made_in_any_mode_serve_training(h, w):
    inputs = draw(h, w)
    clear_tables()
    with torch.inference_mode():
        step(*inputs)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in inputs]
        loss = step(*fake)
        assert isinstance(loss, FakeTensor)
        assert all(isinstance(g, FakeTensor) for g in torch.autograd.grad(loss, fake))
    gradients = torch.autograd.grad(step(*inputs), inputs)
    clear_tables()
    torch.testing.assert_close(gradients, torch.autograd.grad(step(*inputs), inputs))


def test_fake_tensors_have_shape_and_dtype():
    with FakeTensorMode():
        x = torch.empty(7, 3, 6, 5, device="cuda", dtype=torch.bfloat16)
        spectrum = kernel_spectrum(torch.empty(4, 3, 3, 3, device="cuda"), (6, 5))
        assert (spectrum.shape, spectrum.device.type) == ((18, 2, 4, 3), "cuda")
        y, x_hat = OPS.fourier_conv(x.float(), spectrum, "triton")
        assert (y.shape, x_hat.shape) == ((7, 4, 6, 5), (2, 18, 7, 3))
        assert fourier_conv(x, spectrum, backend="torch").dtype == torch.bfloat16


@pytest.mark.parametrize("size", [6, 12, 114])
def test_saves_the_spectrum_and_one_transform(size):
    x, kernel = draw(size, size, torch.float32)
    spectrum = kernel_spectrum(kernel, (size, size))
    with saved_tensors() as saved:
        fourier_conv(x, spectrum)
    extra = sum(t.nbytes for t in saved if t.data_ptr() != spectrum.data_ptr())
    assert extra == x.nbytes * 2 * (size // 2 + 1) // size


def test_is_deterministic():
    inputs = draw(11, 12, torch.float32)
    runs = [torch.autograd.grad(step(*inputs), inputs) for _ in range(4)]
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_derivatives_by_torch_func():
    x, kernel = (t.detach() for t in draw(4, 5))
    expected = torch.autograd.grad(step(x, kernel.requires_grad_()), kernel)[0]
    ours = torch.func.grad(lambda kernel: step(x, kernel))(kernel.detach())
    torch.testing.assert_close(ours, expected)


def test_chooses_the_fast_path_and_obeys():
    x, kernel = draw(4, 5)
    spectrum = kernel_spectrum(kernel, (4, 5))
    assert backends.choose("fourier_conv", spectrum, x) == "torch"
    with lipfast.backend("reference"):
        y = fourier_conv(x, spectrum)
    torch.testing.assert_close(y, fourier_conv(x, spectrum, backend="torch"))


def one(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


X, S = (2, 3, 4, 5), (12, 2, 6, 3)
BAD_INPUTS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: kernel_spectrum([1.0], (2, 2)), TypeError, "kernel must be a torch.Tensor, got list"),
    (lambda: kernel_spectrum(one(1, 1, 1, 1, dtype=torch.int32), (2, 2)), TypeError, "torch.int32"),
    (lambda: kernel_spectrum(one(1, 1, 1), (2, 2)), ValueError, r"kernel must .* got \(1, 1, 1\)"),
    (lambda: kernel_spectrum(one(1, 1, 0, 1), (2, 2)), ValueError, r"got \(1, 1, 0, 1\)"),
    (lambda: kernel_spectrum(one(1, 1, 1, 1), (2, 0)), ValueError, r"map_size .* got \(2, 0\)"),
    (lambda: kernel_spectrum(one(1, 1, 1, 1), (2,)), ValueError, r"map_size .* got \(2,\)"),
    (lambda: kernel_spectrum(one(1, 1, 1, 1), (2, 2.0)), ValueError, "map_size must be two"),
    (lambda: fourier_conv(3, one(*S)), TypeError, "x must be a torch.Tensor, got int"),
    (lambda: fourier_conv(one(*X), 3), TypeError, "spectrum must be a torch.Tensor, got int"),
    (
        lambda: fourier_conv(one(*X), one(*S, dtype=torch.complex64)),
        TypeError,
        "dtype of spectrum must be .* got torch.complex64",
    ),
    (lambda: fourier_conv(one(*X, dtype=torch.float64), one(*S)), TypeError, "got torch.float64"),
    (
        lambda: fourier_conv(one(*X), one(*S, dtype=torch.float64)),
        TypeError,
        "one of torch.float64 with a spectrum in torch.float64, got torch.float32",
    ),
    (
        lambda: fourier_conv(one(*X), torch.ones(S, device="meta")),
        ValueError,
        "spectrum must be on the device cpu of x, got meta",
    ),
    (lambda: fourier_conv(one(3, 4, 5), one(*S)), ValueError, r"x must .* got \(3, 4, 5\)"),
    (lambda: fourier_conv(one(2, 3, 0, 5), one(*S)), ValueError, r"x must .* got \(2, 3, 0, 5\)"),
    (
        lambda: fourier_conv(one(*X), one(12, 2, 6, 4)),
        ValueError,
        r"spectrum must have the shape \(12, 2, out, 3\) .* got \(12, 2, 6, 4\)",
    ),
    (lambda: fourier_conv(one(*X), one(12, 6, 3)), ValueError, "spectrum must have the shape"),
    (lambda: fourier_conv(one(*X), one(*S), backend="cpp"), ValueError, "has only the backends"),
    (
        lambda: fourier_conv(
            one(*X, dtype=torch.float64), one(*S, dtype=torch.float64), backend="triton"
        ),
        ValueError,
        "it computes in float32",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_INPUTS)
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()
