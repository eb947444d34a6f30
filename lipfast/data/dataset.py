"""The container that every data set is read into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """A labelled image set in memory.

    Args:
        name: name of the set, as given to `load`.
        images: uint8, shape (n, c, h, w), pixel values 0 to 255.
        labels: int64, shape (n,), values 0 to `n_classes` - 1.
        classes: one name per class.

    Raises:
        TypeError: wrong dtype of images or labels.
        ValueError: wrong shapes, an empty set, or labels out of range.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8, got {self.images.dtype}")
        if self.labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {self.labels.dtype}")
        if self.images.ndim != 4 or 0 in self.images.shape:
            raise ValueError(
                f"images must be non-empty of shape (n, c, h, w), got {tuple(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must have shape ({len(self.images)},), got {tuple(self.labels.shape)}"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(
                f"labels must be in 0..{len(self.classes) - 1}, got values from {low} to {high}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one image."""
        _, c, h, w = self.images.shape
        return c, h, w


def channel_mean(dataset: Dataset) -> Tensor:
    """Mean of every channel over all pixels of all images, for pixel values scaled to [0, 1].

    Returns:
        float32, shape (c,). The sums are exact integers, so their order does not matter.
    """
    total = dataset.images.sum(dim=(0, 2, 3), dtype=torch.int64)
    pixels = dataset.images.numel() // dataset.images.shape[1]
    return (total.double() / (255 * pixels)).float()
