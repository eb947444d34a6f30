"""The Triton kernels of gram_bound, executed on the CPU by Triton's interpreter."""

import pytest
import torch

from lipfast.ops import gram_bound
from lipfast.reference.gram_bound import gram_bound as published

pytestmark = pytest.mark.interpreter


def oracle(weight, q, grad, axis):
    """Row sums and derivatives of the published form in float64."""
    weight, q = (tensor.detach().double().requires_grad_() for tensor in (weight, q))
    r = published(weight, q, axis=axis)
    return r, *torch.autograd.grad(r, (weight, q), grad.double())


def draw(shape: tuple[int, ...], axis: str):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    channels = shape[1] if axis == "in" else shape[0]
    q = torch.rand(channels, generator=generator) + 0.5
    return weight.requires_grad_(), q.requires_grad_(), torch.randn(channels, generator=generator)


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, 3, 3), (3, 3, 3, 3), (17, 17, 3, 3), (5, 17, 2, 4), (33, 40, 1, 1)],
        *[(3, 2, 1, 7), (2, 2, 7, 7), (130, 3, 2, 1), (3, 130, 2, 1), (130, 130, 1, 2)],
    ],
)
def test_forward_and_backward(shape, axis, poisoned_empty):
    weight, q, grad = draw(shape, axis)
    expected = oracle(weight, q, grad, axis)
    r = gram_bound(weight, q, axis=axis, backend="triton")
    ours = (r, *torch.autograd.grad(r, (weight, q), grad))
    for value, reference in zip(ours, expected, strict=True):
        error = (value.double() - reference).abs().max()
        # with one channel the derivative in q is 0, the difference of two numbers of the size of r
        assert error <= 1e-5 * (reference.abs().max() + expected[0].max())


@pytest.mark.parametrize("axis", ["in", "out"])
def test_batches_groups_and_matrices(axis, poisoned_empty):
    generator = torch.Generator().manual_seed(0)
    for shape, groups in [((2, 6, 2, 3, 3), 3), ((4, 6), 2), ((3, 4, 5), 1)]:
        weight = torch.randn(shape, generator=generator).requires_grad_()
        values = []
        for name in ("triton", "reference"):
            r = gram_bound(weight, axis=axis, groups=groups, backend=name)
            values.append((r, *torch.autograd.grad(r.square().sum(), weight)))
        for ours, reference in zip(*values, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-3)


def test_writes_the_signs_of_the_other_backends():
    weight = torch.randn(40, 35, 3, 3)
    weight[:, 3] = 0
    op = torch.ops.lipfast.gram_bound
    ours = op(weight, None, "in", 1, "triton")[1]
    other = op(weight, None, "in", 1, "torch")[1]
    assert ours.shape == (1, 35, 13, 35)
    assert (ours != other).float().mean() < 1e-4  # a sum near zero may round to either side
    assert not ours[0, 3].any()
    assert not ours[0, :, :, 3].any()


def test_more_kernels_than_one_launch_takes(monkeypatch, poisoned_empty):
    from lipfast.kernels import gram_bound as kernels

    monkeypatch.setattr(kernels, "_MAX_BATCH", 2)
    weight = torch.randn(5, 3, 4, 2, 2).requires_grad_()
    for name in ("triton", "reference"):
        r = gram_bound(weight, backend=name)
        (grad,) = torch.autograd.grad(r.sum(), weight)
        if name == "triton":
            ours = (r, grad)
    torch.testing.assert_close(ours, (r, grad))
