"""A small training run: three classes of stripes, a network of two layers."""

import torch
from torch import nn

from lipfast.data import Dataset, DeviceLoader, channel_mean
from lipfast.training import TrainConfig, train

N, BATCH = 45, 16
CONFIG = {"epochs": 3, "lr": 0.1, "weight_decay": 1e-3, "batch_size": BATCH}


def make_dataset():
    """Three classes of noisy stripes that a small network learns."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    images = torch.randint(0, 120, (N, 1, 4, 4), generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, :, label] += 120
    return Dataset("stripes", images.byte(), labels, ("a", "b", "c"))


def make_loader(augment="crop-flip", **options):
    data = make_dataset()
    options = {"batch_size": BATCH, "train": True, "augment": augment} | options
    return DeviceLoader(data, mean=channel_mean(data), **options)


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def run(model=None, loader=None, config=None, **options):
    model = model or make_model()
    result = train(
        model,
        loader or make_loader(),
        config or TrainConfig(**CONFIG),
        progress=False,
        **options,
    )
    return model, result


def assert_same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
