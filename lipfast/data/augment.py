"""Random augmentations of uint8 batches, drawn on the host and applied on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .randaugment import RandAugment

AUGMENTATIONS = ("crop-flip", "randaugment")
_PADDING = 4

Augmentation = Callable[[Tensor, int], Tensor]


def draw(name: str, n: int, generator: torch.Generator, device: torch.device) -> Augmentation:
    """Draw the augmentation of the n samples of one epoch.

    Returns:
        A function of (images, start): images uint8 of shape (b, c, h, w) on `device` are samples
        start to start + b - 1 of the epoch; the result has the same shape and dtype.
    """
    if name == "crop-flip":
        return CropFlip(n, generator, device)
    return RandAugment(n, generator, device)


class CropFlip:
    """Crop at a random place after zero padding by 4 pixels, then flip every second image or so."""

    def __init__(self, n: int, generator: torch.Generator, device: torch.device) -> None:
        offsets = torch.randint(2 * _PADDING + 1, (2, n, 1), generator=generator)
        flips = torch.randint(2, (n, 1), generator=generator, dtype=torch.bool)
        self._top, self._left = offsets.to(device)
        self._flip = flips.to(device)

    def __call__(self, images: Tensor, start: int) -> Tensor:
        b, c, h, w = images.shape
        chosen = slice(start, start + b)
        columns = torch.arange(w, device=images.device)
        columns = torch.where(self._flip[chosen], columns.flip(0), columns) + self._left[chosen]
        rows = torch.arange(h, device=images.device) + self._top[chosen]
        padded = F.pad(images, (_PADDING,) * 4)
        cut = padded.gather(2, rows[:, None, :, None].expand(b, c, h, w + 2 * _PADDING))
        return cut.gather(3, columns[:, None, None, :].expand(b, c, h, w))
