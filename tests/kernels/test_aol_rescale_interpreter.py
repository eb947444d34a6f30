"""The Triton kernels of aol_rescale, executed on the CPU by Triton's interpreter."""

import pytest
import torch

from lipfast.ops import aol_rescale

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        *[((1, 1, 3, 3), 1), ((3, 3, 3, 3), 1), ((17, 17, 3, 3), 1), ((130, 130, 1, 1), 1)],
        *[((9, 130, 3, 3), 1), ((6, 2, 7, 5), 3), ((4, 7), 2), ((2, 4, 3, 1, 2), 2)],
    ],
)
def test_forward_and_backward(shape, groups, dtype, channels_last, poisoned_empty):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    first = len(shape) % 2
    rows = (*shape[:first], shape[first + 1] * groups)
    r = torch.rand(rows, generator=generator) + 0.5
    r.view(-1)[0] = 0
    grad = torch.randn(shape, generator=generator).to(dtype)
    values = []
    for backend, kind in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = [t.to(kind).requires_grad_() for t in (weight, r)]
        out = aol_rescale(
            *inputs,
            groups=groups,
            dtype=dtype if backend == "triton" else kind,
            channels_last=channels_last,
            backend=backend,
        )
        values.append((out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))))
    assert values[0][0].dtype == dtype
    turned = channels_last and len(shape) >= 4
    assert (values[0][0].movedim(-3, -1) if turned else values[0][0]).is_contiguous()
    for ours, exact, kind in zip(*values, (dtype, torch.float32, torch.float32), strict=True):
        tolerance = torch.finfo(kind).eps + 2**-22
        assert ((ours.double() - exact).abs() <= tolerance * exact.abs().max()).all()


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_any_gradient(layout, poisoned_empty):
    weight, r = torch.randn(9, 5, 3, 2).requires_grad_(), torch.rand(5) + 0.5
    r.requires_grad_()
    grad = torch.randn(2, 3, 5, 9).permute(3, 2, 1, 0)
    if layout == "expanded":
        grad = torch.ones(()).expand(weight.shape)
    pairs = [
        torch.autograd.grad(aol_rescale(weight, r, backend=name), (weight, r), grad)
        for name in ("triton", "reference")
    ]
    torch.testing.assert_close(*pairs)
