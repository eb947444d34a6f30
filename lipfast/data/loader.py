"""Batches of a data set that lives on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .augment import AUGMENTATIONS, draw
from .dataset import Dataset


class DeviceLoader:
    """Iterates over batches (x, y) of a data set whose uint8 pixels live on the device.

    x is float32 of shape (b, c, h, w): pixel values scaled to [0, 1] minus the channel means; y is
    int64 of shape (b,). Gathering, augmentation and mean subtraction run on the device in whole
    batches, without a host synchronisation. The last, smaller batch is kept.

    Order and augmentation depend on (seed, epoch) alone: they are drawn on the host for the global
    batch, then sliced by rank, so that the ranks together see what one process would see. A slice
    is empty when the last batch has fewer samples than there are ranks.

    Args:
        dataset: the images and labels.
        batch_size: samples per global batch, at least 1.
        mean: float tensor of shape (c,), channel means in [0, 1] units (see `channel_mean`).
        train: draw a new order every epoch; otherwise in stored order.
        augment: None, "crop-flip" (crop after zero padding by 4, horizontal flip) or "randaugment"
            (RandAugment(2, 9), RGB only); only for training.
        seed: integer, at least 0.
        device: where pixels live and batches are made.
        rank, world_size: which slice of every global batch this process takes.

    Raises:
        ValueError: an argument out of its range, or of the wrong shape.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        mean: Tensor,
        train: bool,
        augment: str | None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        channels = dataset.input_size[0]
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if mean.shape != (channels,):
            raise ValueError(f"mean must have shape ({channels},), got {tuple(mean.shape)}")
        if augment is not None and augment not in AUGMENTATIONS:
            raise ValueError(
                f"augment must be None or one of {', '.join(AUGMENTATIONS)}, got {augment!r}"
            )
        if augment is not None and not train:
            raise ValueError(f"augment must be None when train is False, got {augment!r}")
        if augment == "randaugment" and channels != 3:
            raise ValueError(f'augment "randaugment" needs 3 channels (RGB), got {channels}')
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be in 0..world_size - 1, got rank {rank} of world_size {world_size}"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.train = train
        self.augment = augment
        self.seed = seed
        self.epoch = 0
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self._images = dataset.images.to(self.device)
        self._labels = dataset.labels.to(self.device)
        self._mean = mean.to(self.device, torch.float32).reshape(1, channels, 1, 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order and augmentation the next iteration has."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def global_batch_size(self, step: int) -> int:
        """Number of samples that all ranks together see in batch `step`."""
        return min(self.batch_size, len(self.dataset) - step * self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.dataset)
        if not self.train:
            for step in range(len(self)):
                start, stop = self._slice(step)
                yield self._normalise(self._images[start:stop]), self._labels[start:stop]
            return
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch))
        order = torch.randperm(n, generator=generator).to(self.device)
        augmentation = None
        if self.augment is not None:
            augmentation = draw(self.augment, n, generator, self.device)
        for step in range(len(self)):
            start, stop = self._slice(step)
            index = order[start:stop]
            images = self._images[index]
            if augmentation is not None:
                images = augmentation(images, start)
            yield self._normalise(images), self._labels[index]

    def _slice(self, step: int) -> tuple[int, int]:
        first, size = step * self.batch_size, self.global_batch_size(step)
        start = first + size * self.rank // self.world_size
        stop = first + size * (self.rank + 1) // self.world_size
        return start, stop

    def _normalise(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).div_(255).sub_(self._mean)


def _seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed},{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
