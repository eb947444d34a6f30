"""Defects of published implementations: speed and memory."""

import pytest
import torch
from moved_layers import METHODS, make_conv
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lipfast
from lipfast import backends, ops, reference
from lipfast import nn as lnn


class OpCounter(TorchDispatchMode):
    """Counts operations by name and keeps the devices of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.devices |= {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result

    def count(self, *names: str) -> int:
        return sum(name in names for name in self.names)


def training_step(method: str, device: str) -> None:
    conv = lnn.METHODS[method].conv(4, 6, 3, device=device)
    linear = lnn.METHODS[method].linear(6, 5, device=device)
    x = torch.empty(2, 4, 5, 5, device=device)
    linear(conv(x).mean(dim=(2, 3))).square().sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_training_step_reads_no_value_on_the_host(method):
    """float(norm) and the like cannot run where tensors have no values."""
    with FakeTensorMode():
        with pytest.raises(Exception, match=r"item|local_scalar"):
            float(torch.ones(2).norm())
        training_step(method, "cpu")
    counter = OpCounter()
    conv = make_conv(method, 4, 4, 3)
    conv._check_finite = lambda *, on_device: None  # a check of values that runs on a CPU only
    x = torch.randn(2, 4, 5, 5)
    with counter:
        conv(x).sum().backward()
    assert counter.count("_local_scalar_dense", "is_nonzero", "equal", "nonzero") == 0


@pytest.mark.parametrize("method", METHODS)
def test_training_step_builds_nothing_on_the_cpu_for_another_device(method):
    conv = lnn.METHODS[method].conv(4, 6, 3, device="meta")
    linear = lnn.METHODS[method].linear(6, 5, device="meta")
    x = torch.empty(2, 4, 5, 5, device="meta")
    for training in (True, False):
        counter = OpCounter()
        with counter:
            y = linear.train(training)(conv.train(training)(x).mean(dim=(2, 3)))
            if training:
                y.square().sum().backward()
        assert counter.devices == {"meta"}


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 7)])
def test_half_of_the_frequencies(size):
    h, w = size
    x = torch.randn(1, 4, h, w)
    lot = make_conv("lot", 4, 4, 3)
    cayley = make_conv("cayley", 4, 4, 3)
    for training in (True, False):
        (spectrum,) = lot.train(training)._weights(size, x)
        assert len(spectrum) == (h + 2) * ((w + 2) // 2 + 1)  # of (h + 2) (w + 2)
        (spectrum,) = cayley.train(training)._weights(size, x)
        assert len(spectrum) == h * (w // 2 + 1)
    for method in ("lot", "cayley"):
        assert not make_conv(method, 4, 4, 1)._weights(size, x)[0].is_complex()


def test_one_orthogonalisation_for_all_matrices(monkeypatch):
    shapes = []
    polar = ops.polar

    def record(matrices, **options):
        shapes.append(tuple(matrices.shape))
        return polar(matrices, **options)

    monkeypatch.setattr(ops, "polar", record)
    for k in (1, 3, 5):
        make_conv("bcop", 8, 8, k)._training_weights((1, 1))
    assert shapes == [(1, 1, 8, 8), (1, 5, 8, 8), (1, 9, 8, 8)]  # of one layer each
    lot = make_conv("lot", 8, 8, 3)
    lot(torch.randn(1, 8, 4, 4))
    assert shapes[3:] == [(1, 6 * 4, 2, 8, 8)]


def test_composition_multiplies_by_each_factor_once():
    counts = []
    for k in (3, 5):
        factor, halves = torch.randn(8, 8), torch.randn(2 * (k - 1), 8, 4)
        with OpCounter() as counter:
            ops.block_conv(factor, halves)
            reference.block_conv(factor, halves @ halves.mT)
        counts.append((counter.count("bmm"), counter.count("mm")))
    assert counts == [(8 + 5, 0), (16 + 9, 0)]  # the published form: 25 for k = 3


def test_maxmin_saves_one_bit_per_pair_in_one_operation():
    if backends.choose("maxmin", torch.zeros(2, 2)) == "reference":
        pytest.skip("neither the extension nor Triton can run here")
    x = torch.randn(8, 32, 16, 16, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), OpCounter() as counter:
        y = lnn.MaxMin()(x)
    assert sum(t.nbytes for t in saved) <= x.numel() // 16 + 64
    assert sorted({*counter.names} - {"movedim"}) == ["maxmin"]  # movedim is a view
    assert counter.count("maxmin") == 1
    with OpCounter() as counter:
        y.sum().backward()
    assert counter.count("maxmin_backward") == 1
    with lipfast.backend("reference"), OpCounter() as counter:
        lnn.MaxMin()(x.detach())
    assert len(counter.names) > 3  # as published: reshape, two reductions, a concatenation
