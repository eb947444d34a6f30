"""residual_conv on its Triton kernels, executed by Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from lipfast.ops import residual_conv
from lipfast.reference import residual_conv as published

pytestmark = pytest.mark.interpreter

OP = torch.ops.lipfast.residual_conv.default


def draw(shape: tuple[int, ...], hidden: int, kh: int, kw: int, *, scalar=False, bias=True):
    """x, kernel, bias and scale in float32."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(hidden, shape[1], kh, kw, generator=generator)
    kernel /= (shape[1] * kh * kw) ** 0.5
    tensors = [torch.randn(shape, generator=generator), kernel]
    tensors.append(torch.randn(hidden, generator=generator) if bias else None)
    tensors.append(torch.rand(() if scalar else hidden, generator=generator) + 0.1)
    return tensors


def step(function, tensors: list[Tensor | None], *arguments: str) -> list[Tensor]:
    """Value and gradients."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, *arguments)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], grad)]


def ours(*arguments) -> Tensor:
    return residual_conv(*arguments, backend="triton")


CASES = [
    # shape, hidden, kh, kw, a scalar scale, a bias; hidden not and being a multiple of eight
    ((2, 5, 6, 4), 7, 3, 3, False, True),
    ((1, 17, 3, 2), 40, 5, 1, True, True),
    ((2, 1, 3, 3), 3, 3, 3, False, True),
    ((2, 3, 1, 1), 16, 3, 3, False, False),
    ((0, 3, 4, 4), 5, 3, 3, False, True),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_form(case, mode, layout, poisoned_empty):
    *sizes, scalar, bias = case
    tensors = draw(*sizes, scalar=scalar, bias=bias)
    tensors[0] = tensors[0].contiguous(memory_format=layout)
    wide = [None if t is None else t.double() for t in tensors]
    exact = step(published, wide, mode)
    values, theirs = step(ours, tensors, mode), step(published, tensors, mode)
    assert values[0].stride() == tensors[0].stride()
    for value, other, reference in zip(values, theirs, exact, strict=True):
        assert value.dtype == torch.float32
        error, allowed = ((t.double() - reference).norm() for t in (value, other))
        # the one number dL/dscale is a sum of terms as large as y
        size = max(reference.detach().norm(), exact[0].detach().norm())
        floor = 4 * torch.finfo(torch.float32).eps * float(size)
        assert float(error.detach()) <= 2 * float(allowed.detach()) + floor


@pytest.mark.parametrize("hidden", [7, 16])
def test_mask_is_that_of_the_other_backend(hidden):
    x, *rest = draw((2, 4, 5, 3), hidden, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    masks = [OP(x, *rest, "zeros", x.dtype, name)[1] for name in ("triton", "torch")]
    assert torch.equal(*masks)
    assert torch.equal(OP(x.contiguous(), *rest, "zeros", x.dtype, "triton")[1], masks[0])


@pytest.mark.parametrize("change", [lambda b: b[::2], lambda b: b[:1].expand(8)])
def test_takes_a_bias_of_any_strides(change):
    x, kernel, bias, scale = draw((2, 4, 5, 3), 8, 3, 3)
    bias = change(torch.cat([bias, -bias]))
    arguments = ("zeros", x.dtype, "triton")
    y, mask = OP(x, kernel, bias, scale, *arguments)
    expected, expected_mask = OP(x, kernel, bias.contiguous(), scale, *arguments)
    assert torch.equal(y, expected)
    assert torch.equal(mask, expected_mask)
    masked = torch.ops.lipfast.residual_conv_masked
    hidden = (masked(x, kernel, b, mask, "zeros") for b in (bias, bias.contiguous()))
    assert torch.equal(*hidden)


@pytest.mark.parametrize("channels", [1, 4])
def test_second_derivative(channels):
    tensors = [t.requires_grad_() for t in draw((2, channels, 3, 4), 5, 3, 3)]
    values = []
    for function in (ours, published):
        grads = torch.autograd.grad(
            function(*tensors, "circular").square().sum(), tensors, create_graph=True
        )
        total = sum(g.square().sum() for g in grads)
        values.append(torch.autograd.grad(total, tensors))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_autocast_keeps_the_sum_in_float32():
    tensors = draw((2, 5, 6, 4), 8, 3, 3)
    exact = step(published, [t.double() for t in tensors], "zeros")
    with torch.autocast("cpu", dtype=torch.float16):
        values = step(ours, tensors, "zeros")
    for value, reference in zip(values, exact, strict=True):
        assert value.dtype == torch.float32
        error = (value.double() - reference).norm() / reference.detach().norm()
        assert error <= 4 * torch.finfo(torch.float16).eps


def test_registration():
    x, kernel, bias, scale = (t.requires_grad_() for t in draw((2, 4, 5, 3), 6, 3, 3))
    torch.library.opcheck(OP, (x, kernel, bias, scale, "zeros", torch.float32, "triton"))
    turned = x.detach().contiguous(memory_format=torch.channels_last)
    arguments = (turned, kernel, bias, scale, "zeros", torch.float32, "triton")
    torch.library.opcheck(OP, arguments, test_utils="test_faketensor")
    x, kernel, bias, scale = (t.detach() for t in (x, kernel, bias, scale))
    mask = OP(x, kernel, bias, scale, "zeros", x.dtype, "triton")[1]
    ops = torch.ops.lipfast
    torch.library.opcheck(ops.residual_conv_masked.default, (x, kernel, bias, mask, "zeros"))
    hidden = ops.residual_conv_masked(x, kernel, bias, mask, "zeros")
    torch.library.opcheck(ops.residual_conv_subtract.default, (x, hidden, kernel, scale, "zeros"))


def test_compiles_whole():
    tensors = draw((2, 4, 5, 3), 6, 3, 3)
    compiled = torch.compile(
        lambda *leaves: ours(*leaves, "zeros"), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(step(compiled, tensors), step(ours, tensors, "zeros"), strict=True):
        assert torch.equal(a, b)
