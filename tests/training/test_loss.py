import math

import pytest
import torch
import torch.nn.functional as F

from lipfast.training import margin_cross_entropy


def reference(scores, labels, offset, temperature):
    """The definition, sample by sample, in float64."""
    losses = []
    for row, label in zip(scores.double().tolist(), labels.tolist(), strict=True):
        row[label] -= offset
        logits = [value / temperature for value in row]
        top = max(logits)
        total = top + math.log(sum(math.exp(value - top) for value in logits))
        losses.append(temperature * (total - logits[label]))
    return sum(losses) / len(losses)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(13, 7, generator=generator), torch.arange(13) % 7


def test_defaults_match_the_definition(batch):
    scores, labels = batch
    expected = reference(scores, labels, 2 * math.sqrt(2) * 36 / 255, 0.25)
    loss = margin_cross_entropy(scores.double(), labels)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("offset", "temperature"), [(0.0, 1.0), (1.5, 0.1), (0.3, 4.0)])
def test_arguments_match_the_definition(batch, offset, temperature):
    scores, labels = batch
    expected = reference(scores, labels, offset, temperature)
    loss = margin_cross_entropy(scores, labels, offset=offset, temperature=temperature)
    plain = temperature * F.cross_entropy(
        (scores - offset * F.one_hot(labels, 7)) / temperature, labels
    )
    assert abs(loss.item() - expected) <= 2 * abs(plain.item() - expected) + 1e-6


def test_sum_and_empty_batch(batch):
    scores, labels = batch
    total = margin_cross_entropy(scores.double(), labels, reduction="sum").item()
    assert total == pytest.approx(13 * margin_cross_entropy(scores.double(), labels).item())
    empty = scores[:0].requires_grad_()
    loss = margin_cross_entropy(empty, labels[:0], reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert empty.grad.shape == (0, 7)


def test_gradient(batch):
    scores, labels = batch
    inputs = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: margin_cross_entropy(s, labels), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_scores_are_taken_to_float32(batch, dtype):
    scores, labels = batch
    loss = margin_cross_entropy(scores.to(dtype), labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, margin_cross_entropy(scores.to(dtype).float(), labels))


def test_input_is_not_changed(batch):
    scores, labels = batch
    before = scores.clone()
    margin_cross_entropy(scores, labels)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("scores", "labels", "options", "error", "message"),
    [
        (torch.ones(2, 3).long(), torch.tensor([0, 1]), {}, TypeError, "scores must be floating"),
        (torch.ones(2, 3), torch.ones(2), {}, TypeError, "labels must be int64, got torch.float32"),
        (torch.ones(3), torch.tensor([0]), {}, ValueError, r"shape \(b, k\), got \(3,\)"),
        (torch.ones(2, 3), torch.tensor([0]), {}, ValueError, r"shape \(2,\), got \(1,\)"),
        (torch.ones(1, 3), torch.tensor([0]), {"temperature": 0.0}, ValueError, "temperature must"),
        (torch.ones(1, 3), torch.tensor([0]), {"offset": math.inf}, ValueError, "offset must be"),
        (torch.ones(1, 3), torch.tensor([0]), {"reduction": "none"}, ValueError, "reduction must"),
    ],
)
def test_rejects(scores, labels, options, error, message):
    with pytest.raises(error, match=message):
        margin_cross_entropy(scores, labels, **options)
