"""The demo's promise: every method trains to these figures on real images, with a proof."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from lipfast import certify
from lipfast.data import load
from lipfast.nn import METHODS
from lipfast.report.experiment import Experiment, adapted_recipe
from lipfast.training import train

LEAST_ACCURACY = 0.93
LEAST_CERTIFIED = {36 / 255: 0.86, 72 / 255: 0.73, 108 / 255: 0.55}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", list(METHODS))
def test_digits(method):
    train_set, test_set = load("digits")
    assert len(test_set) == pytest.approx((len(train_set) + len(test_set)) / 5, abs=1)
    recipe = adapted_recipe("digits", method)
    experiment = Experiment(method, recipe, train_set, test_set, seed=0, device="cpu")
    model = experiment.model()
    train(model, experiment.train_loader(), experiment.config(), progress=False)
    result = certify.report(model, experiment.test_loader(), radii=tuple(LEAST_CERTIFIED))
    assert result.n_samples == len(test_set)
    assert result.accuracy >= LEAST_ACCURACY
    for eps, least in LEAST_CERTIFIED.items():
        assert result.certified[eps] >= least, eps
    assert len(result.layer_bounds) == 8
    assert max(result.layer_bounds.values()) <= 1 + 1e-6
    for x, _ in experiment.test_loader():
        variances = list(certify.batch_activation_variance(model.eval(), x).values())
        for before, after in itertools.pairwise(variances):
            assert after <= before * (1 + 1e-5)
    for eps, certified in result.certified.items():
        assert attacked_accuracy(model, experiment.test_loader(), eps) >= certified
    assert attacked_accuracy(model, experiment.test_loader(), 1.0) < 0.5  # the attack does work


def attacked_accuracy(model: nn.Module, loader, eps: float, steps: int = 10) -> float:
    """Accuracy under projected gradient ascent in the Euclidean ball of radius eps."""
    hits, count = 0, 0
    for x, y in loader:
        adversarial = x
        for _ in range(steps):
            moved = adversarial.detach().requires_grad_()
            loss = nn.functional.cross_entropy(model(moved), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            step = unit(gradient) * (2.5 * eps / steps)
            adversarial = x + shorten(adversarial + step - x, eps)
        hits += int((model(adversarial).argmax(1) == y).sum())
        count += len(y)
    return hits / count


def unit(v: Tensor) -> Tensor:
    return v / v.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]


def shorten(v: Tensor, eps: float) -> Tensor:
    norm = v.flatten(1).norm(dim=1)[:, None, None, None]
    return v * (eps / norm.clamp_min(eps))
