"""CPL: the norm it divides by, in training and evaluation, and the state of its estimate."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lipfast import certify, ops, reference
from lipfast import nn as lnn

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(*args, seed: int = 0, **kwargs) -> lnn.CPLConv2d:
    torch.manual_seed(seed)
    return lnn.CPLConv2d(*args, **kwargs)


def dense_norm(kernel: Tensor, size: tuple[int, int], padding_mode: str) -> float:
    kernel = kernel.detach().to(F64)
    n = kernel.shape[1] * math.prod(size)
    basis = torch.eye(n, dtype=F64).reshape(n, kernel.shape[1], *size)
    dense = reference.conv2d_same(basis, kernel, None, padding_mode).flatten(1)
    return float(torch.linalg.matrix_norm(dense, 2))


def share_of_the_limit(layer: lnn.CPLConv2d | lnn.CPLLinear, size: tuple[int, int]) -> float:
    """t norm(W)^2 / 2 of the weights at hand: the layer is 1-Lipschitz up to 1."""
    kernel, _, t = layer._weights(size, torch.zeros(()))
    return float(t.detach()) * dense_norm(kernel, size, layer.padding_mode) ** 2 / 2


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("lr", [0.3, 30.0])
@pytest.mark.parametrize("steps", [0, 1, 10, 100])
def test_evaluation_is_certified_and_tight_after_any_training(steps, lr, padding_mode):
    size = (5, 6)
    layer = make(4, 4, 3, padding_mode=padding_mode)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    x, direction = draw(2, 8, 4, *size)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) * direction).mean().backward()
        optimizer.step()
    layer.eval()
    assert 0.999 <= share_of_the_limit(layer, size) <= 1
    assert layer.lipschitz_bound(size) == 1
    other = make(4, 4, 3, padding_mode=padding_mode, seed=1).eval()
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("sizes", [[(2, 2), (7, 5), (2, 2)], [(40, 3), (1, 1), (3, 40)]])
def test_evaluation_follows_the_map(sizes):
    layer = make(3, 3, 3)
    layer(draw(1, 3, *sizes[0]))
    layer.eval()
    for size in sizes:
        layer(draw(1, 3, *size))
        assert 0.999 <= share_of_the_limit(layer, size) <= 1


@pytest.mark.parametrize("channels", [(3, 3), (2, 5), (5, 2)])
@pytest.mark.parametrize("k", [1, 3])
def test_linear_layers_and_other_channels_before_any_training(channels, k):
    assert 0.999 <= share_of_the_limit(make(*channels, k).eval(), (4, 4)) <= 1
    torch.manual_seed(0)
    assert 0.999 <= share_of_the_limit(lnn.CPLLinear(*channels).eval(), (1, 1)) <= 1


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_sound_norm_holds_in_training_on_every_map(k, padding_mode):
    layer = make(4, 4, k, padding_mode=padding_mode, norm="sound")
    for size in ((1, 1), (3, 5), (6, 6)):
        assert 0 < share_of_the_limit(layer, size) <= 1 + 1e-5
        x = draw(2, 4, *size)
        training = layer(x)
        torch.testing.assert_close(layer.eval()(x), training, rtol=1e-5, atol=1e-6)
        assert layer.lipschitz_bound() == 1
        assert share_of_the_limit(layer, size) <= 1
        layer.train()


def test_sound_norm_of_a_wide_layer_is_by_unfoldings(monkeypatch):
    monkeypatch.setattr("lipfast.nn.residual._FREQUENCY_LIMIT", 2)
    layer = make(3, 3, 3, norm="sound")
    wide = share_of_the_limit(layer, (5, 5))
    monkeypatch.undo()
    assert wide < share_of_the_limit(layer, (5, 5)) <= 1
    layer(draw(1, 3, 5, 5)).sum().backward()
    assert layer.weight.grad.norm() > 0


def test_a_converged_estimate_agrees_with_the_bound():
    layer = make(6, 6, 3)
    x = draw(4, 6, 6, 6)
    patch = layer.power_vector[..., :6, :6]
    patch.copy_(ops.conv_norm(layer.weight.detach(), patch, "zeros", steps=2000)[1])
    with torch.no_grad():
        training, evaluation = layer(x), layer.eval()(x)
    assert (training - evaluation).norm() <= 1e-3 * evaluation.norm()


def test_long_training_is_stable_and_the_modes_stay_close():
    """300 steps on one batch at a rate that falls to 0: the estimate follows the norm."""
    torch.manual_seed(0)
    model = nn.Sequential(lnn.CPLConv2d(1, 6, 3), lnn.MaxMin(), lnn.CPLConv2d(6, 6, 3))
    model.extend([lnn.MaxMin(), nn.Flatten(), lnn.CPLLinear(6 * 16, 4)])
    x, labels = draw(32, 1, 4, 4), torch.arange(32) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-5)
    losses = []
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 300)
        loss = nn.functional.cross_entropy(4 * model(x)[:, :4], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        training, evaluation = model(x), model.eval()(x)
    assert (training - evaluation).norm() <= 0.02 * evaluation.norm()
    assert certify.lipschitz_bound(model) == 1


def test_estimate_follows_large_steps_and_is_kept_in_the_state():
    layer = make(4, 4, 3)
    before = layer.power_vector.clone()
    x = draw(2, 4, 5, 5)
    layer(x)
    assert not torch.equal(layer.power_vector[..., :5, :5], before[..., :5, :5])
    assert torch.equal(layer.power_vector[..., 5:, :], before[..., 5:, :])
    other = make(4, 4, 3, seed=1)
    other.load_state_dict(layer.state_dict())
    again = copy.deepcopy(layer)
    assert torch.equal(other(x), again(x))
    assert torch.equal(other.power_vector, again.power_vector)
    assert layer.double().power_vector.dtype == F64
    assert layer.to("meta").power_vector.is_meta


@pytest.mark.parametrize("norm", ["estimate", "sound"])
def test_torch_func_gradients_leave_the_state_alone(norm):
    layer = make(3, 3, 3, norm=norm)
    x = draw(2, 3, 4, 4)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    expected = copy.deepcopy(layer)
    before = layer.power_vector.clone()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, x).square().sum()

    gradients = torch.func.grad(loss)(parameters, x)
    assert torch.equal(layer.power_vector, before)
    expected(x).square().sum().backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    torch.testing.assert_close(
        per_sample["weight"].sum(dim=0), gradients["weight"], rtol=1e-4, atol=1e-4
    )


def test_names_an_unknown_norm():
    with pytest.raises(ValueError, match="norm: CPLConv2d expected 'estimate' or 'sound', got 1"):
        lnn.CPLConv2d(3, 3, 3, norm=1)
    with pytest.raises(ValueError, match="norm: CPLLinear expected"):
        lnn.CPLLinear(3, 3, norm="spectral")
