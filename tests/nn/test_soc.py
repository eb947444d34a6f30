"""SOC: its certificate in evaluation, its norm in training, the published form, its state."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from moved_layers import settle_norm
from torch import Tensor, nn

import lipfast
from lipfast import nn as lnn
from lipfast.saved import saved_tensors, storage_bytes

F64 = torch.float64
SIZES = list(itertools.product((1, 2, 5, 9), (1, 3, 7)))


def dense(layer, size: tuple[int, int]) -> Tensor:
    """The singular values of a layer without bias, in float64, with the weights as stored."""
    n = layer.in_channels * size[0] * size[1]
    basis = torch.eye(n, dtype=F64).reshape(n, layer.in_channels, *size)
    with torch.no_grad():
        if layer.training:
            return torch.linalg.svdvals(layer(basis.to(layer.weight.dtype)).flatten(1).double())
        weights = tuple(w.double() for w in layer._sound((1, 1)).weights)
        return torch.linalg.svdvals(layer._run(basis, weights).flatten(1))


def make(seed: int, **options) -> lnn.SOCConv2d:
    """A layer with a kernel of its own kind: dense, low rank, sparse, uneven or smooth."""
    generator = torch.Generator().manual_seed(seed)
    mode = ("zeros", "circular")[seed % 2]
    c, k = ((2, 3), (3, 3), (4, 1), (3, 3), (5, 1), (2, 5))[seed % 6]
    layer = lnn.SOCConv2d(c, c, k, bias=False, padding_mode=mode, **options)
    weight = torch.randn(layer.weight.shape, generator=generator)
    kind = seed // 10 % 5
    if kind == 1:
        weight = torch.einsum("o,ihw->oihw", weight[:, 0, 0, 0], weight[0])
    elif kind == 2:
        weight = weight * (torch.rand(weight.shape, generator=generator) < 0.1)
    elif kind == 3:
        weight = weight * 10 ** (6 * torch.rand(c, 1, 1, 1, generator=generator) - 3)
    elif kind == 4:
        weight = weight.mean(dim=(2, 3), keepdim=True) + 0.01 * weight
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer.eval()


@pytest.mark.parametrize("start", range(0, 200, 25))
def test_evaluation_is_a_contraction_for_200_kernels(start):
    for seed in range(start, start + 25):
        options = {"terms": 4 + seed % 3, "norm": ("spectral", "unfolding")[seed % 7 == 0]}
        layer = make(seed, **options)
        assert layer.lipschitz_bound() <= 1 + 1e-6
        for size in (SIZES[seed % len(SIZES)], (4, 6)):
            assert float(dense(layer, size)[0]) <= layer.lipschitz_bound() * (1 + 1e-11)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_evaluation_is_a_contraction_after_large_steps_and_a_change_of_size(padding_mode):
    torch.manual_seed(0)
    layer = lnn.SOCConv2d(3, 3, 3, bias=False, padding_mode=padding_mode)
    optimizer = torch.optim.SGD(layer.parameters(), lr=20.0, momentum=0.9)
    x, direction = torch.randn(2, 6, 3, 5, 4)
    checked = []
    for step in range(1, 101):
        optimizer.zero_grad()
        (layer(x) * direction).sum().backward()
        optimizer.step()
        if step in (1, 10, 100):
            other = lnn.SOCConv2d(3, 3, 3, bias=False, padding_mode=padding_mode).eval()
            other(x)
            other.load_state_dict(layer.state_dict())
            for copy_of in (layer.eval(), other):
                for size in ((5, 4), (1, 1), (9, 7), (2, 1)):
                    checked.append(float(dense(copy_of, size)[0]))
            layer.train()
    assert len(checked) == 24
    assert max(checked) <= 1 + 1e-6


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_training_is_a_contraction_after_warm_up(padding_mode):
    torch.manual_seed(1)
    layer = lnn.SOCConv2d(4, 4, 3, bias=False, padding_mode=padding_mode)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    x, direction = torch.randn(2, 6, 4, 5, 4)
    for step in range(400):
        optimizer.zero_grad()
        (layer(x) * direction).mean().backward()
        optimizer.step()
        if step >= 300 and step % 25 == 0:
            frozen = copy.deepcopy(layer).double()
            assert max(float(dense(frozen, size)[0]) for size in ((5, 4), (9, 7))) <= 1 + 1e-6


@pytest.mark.parametrize(("terms", "defect"), [(4, 2.4e-3), (5, 4.7e-5), (6, 1e-6)])
@pytest.mark.parametrize("k", [1, 3])
def test_orthogonality_by_degree(terms, defect, k):
    for training in (True, False):
        for seed in range(4):
            torch.manual_seed(seed)
            layer = lnn.SOCConv2d(6, 6, k, bias=False, terms=terms, dtype=F64).train(training)
            settle_norm(layer)
            squares = dense(layer, (4, 5)) ** 2
            assert float((1 - squares).abs().max()) <= defect


def published_soc(x: Tensor, weight: Tensor, terms: int) -> Tensor:
    """Singla and Feizi 2021, with exact norms of the four unfoldings."""
    c, _, k, _ = weight.shape
    kernel = 0.5 * (weight - weight.transpose(0, 1).flip(2, 3))
    unfoldings = [
        kernel.reshape(c, -1),
        kernel.transpose(0, 1).reshape(c, -1),
        kernel.permute(0, 2, 1, 3).reshape(c * k, c * k),
        kernel.permute(0, 3, 1, 2).reshape(c * k, c * k),
    ]
    norm = min(torch.linalg.matrix_norm(unfolding, 2) for unfolding in unfoldings)
    kernel = kernel * ((0.7 if k > 1 else 1.0) / norm)
    term = total = x
    for i in range(1, terms + 1):
        term = F.conv2d(term, kernel, padding=k // 2) / i
        total = total + term
    return total


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("k", [1, 3])
def test_published_checkpoints_give_the_published_outputs(k, backend):
    for seed, c in ((0, 4), (1, 16)):
        torch.manual_seed(seed)
        layer = lnn.SOCConv2d(c, c, k, bias=False, series="taylor", norm="unfolding").eval()
        assert list(layer.state_dict()) == ["weight"]
        x = torch.randn(2, c, 6, 5)
        expected = published_soc(x.double(), layer.weight.detach().double(), 12)
        with torch.no_grad(), lipfast.backend(backend):
            y = layer(x)
        assert float((y - expected).norm()) <= 1e-5 * float(expected.norm())


def test_evaluation_with_another_degree_stays_near_the_layer_that_was_trained():
    layers = []
    for terms in (5, 6):
        torch.manual_seed(0)
        layer = lnn.SOCConv2d(8, 8, 3, eval_terms=terms, dtype=F64).eval()
        layers.append(layer(torch.randn(4, 8, 6, 6, dtype=F64)))
    assert float((layers[0] - layers[1]).norm()) <= 0.04 * float(layers[0].norm())


def test_estimate_is_kept_copied_loaded_moved_and_left_alone_in_evaluation():
    layer = lnn.SOCConv2d(4, 4, 3)
    start = layer.power_vector.clone()
    x = torch.randn(2, 4, 5, 5)
    layer(x)
    moved = layer.power_vector.clone()
    assert not torch.equal(moved, start)
    assert torch.equal(copy.deepcopy(layer).power_vector, moved)
    other = lnn.SOCConv2d(4, 4, 3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.power_vector, moved)
    assert torch.equal(other(x), layer(x))
    layer.eval()(x)
    assert torch.equal(layer.power_vector, other.power_vector)
    assert layer.double().power_vector.dtype == F64


def test_construction_draws_the_same_weights_for_every_norm():
    weights = []
    for norm in ("spectral", "unfolding"):
        torch.manual_seed(0)
        layer = lnn.SOCConv2d(3, 3, 3, norm=norm)
        weights.append((layer.weight, layer.bias, torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_layer_that_saves_its_input_keeps_little_more(padding_mode):
    results, saved = [], []
    for save in ("terms", "input"):
        torch.manual_seed(0)
        options = {"bias": False, "padding_mode": padding_mode, "save": save, "dtype": F64}
        layer = lnn.SOCConv2d(16, 16, 3, **options)
        x = torch.randn(16, 16, 16, 16, dtype=F64, requires_grad=True)
        grad = torch.randn_like(x)
        with saved_tensors() as kept:
            y = layer(x)
        saved.append(storage_bytes(kept) / x.nbytes)
        results.append([y, *torch.autograd.grad(y, [x, layer.weight], grad)])
    assert saved[1] <= 1.2 < 4.9 <= saved[0]
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) <= 1e-12 * float(a.norm())


@pytest.mark.parametrize("save", ["terms", "input"])
def test_network_trains_as_one_graph(save):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        lnn.SOCConv2d(4, 6, 3, save=save), lnn.MaxMin(), lnn.SOCConv2d(6, 6, 1, save=save)
    )
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 4, 5, 4)
    results = []
    for function in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.load_state_dict(state)
        loss = function(x).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([loss, *gradients, model[0].power_vector.clone()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [lnn.SOCConv2d, lnn.SOCLinear])
def test_bad_arguments(layer):
    sizes = (4, 4, 3) if layer is lnn.SOCConv2d else (4, 4)
    for name, value in (("series", "chebyshev"), ("norm", "fro"), ("save", "all")):
        with pytest.raises(ValueError, match=f"{name}: {layer.__name__} expected .*got '{value}'"):
            layer(*sizes, **{name: value})
    with pytest.raises(ValueError, match=r"terms: expected a degree that reaches 2\.1"):
        layer(*sizes, terms=1)
