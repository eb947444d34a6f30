"""Triton launches on the current GPU: the launchers make that of their operands current."""

import contextlib

import pytest
import torch

from lipfast import ops

pytestmark = pytest.mark.interpreter

MAP, KERNEL = (2, 4, 3, 3), (4, 4, 3, 3)
CALLS = {
    "maxmin": (ops.maxmin, [MAP], ()),
    "gram_bound": (ops.gram_bound, [KERNEL], ()),
    "aol_rescale": (ops.aol_rescale, [KERNEL, (4,)], ()),
    "fourier_conv": (ops.fourier_conv, [MAP, (6, 2, 5, 4)], ()),
    "polar": (ops.polar, [(2, 4, 5)], ()),
    "skew_exp": (ops.skew_exp, [MAP, KERNEL], ((1.0, 1.0, 0.5), "zeros")),
    "residual_conv": (ops.residual_conv, [MAP, KERNEL, (4,), (4,)], ("zeros",)),
}


@pytest.mark.parametrize("op", CALLS)
def test_every_launch_is_on_the_gpu_of_its_operands(op, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    current, launches = [], []
    run = InterpretedFunction.run

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def launch(self, *arguments, **options):
        launches.append(list(current))
        return run(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(InterpretedFunction, "run", launch)
    function, shapes, rest = CALLS[op]
    leaves = [torch.rand(shape).requires_grad_() for shape in shapes]
    y = function(*leaves, *rest, backend="triton")
    forward = len(launches)
    torch.autograd.grad(y.sum(), leaves)
    assert 0 < forward < len(launches)
    assert all(launches)
