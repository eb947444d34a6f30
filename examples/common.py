"""What the examples share: scikit-learn's digits as tensors, and the two accuracies."""

import torch
from torch import Tensor, nn

from lipfast import certify, data

EPS = 36 / 255


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test set: pixels in [0, 1] minus their mean, (n, 1, 8, 8), and labels."""
    train, test = data.load("digits")
    mean = data.channel_mean(train)
    return tuple((part.images / 255 - mean, part.labels) for part in (train, test))


def batches(images: Tensor, labels: Tensor, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    """One epoch in random order."""
    order = torch.randperm(len(labels))
    return [(images[part], labels[part]) for part in order.split(size)]


def show(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Print the accuracy, and the share of images that no l2 change of 36/255 can flip: proved."""
    report = certify.report(model, [(images, labels)], radii=[EPS])
    print(
        f"{name}: accuracy {report.accuracy:.3f}, certified at 36/255 {report.certified[EPS]:.3f}, "
        f"Lipschitz bound {report.lipschitz_bound:.3f}"
    )
