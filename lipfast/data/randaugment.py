"""RandAugment for whole batches of uint8 images on the device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_OPS = (
    "identity",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_GEOMETRIC = _OPS[1:6]
_NUM_OPS = 2

# Strength 9 on the usual scale of 31 steps, 0 to 30.
_LEVEL = 9 / 30
_SHEAR = 0.3 * _LEVEL
_TRANSLATE = 150 / 331 * _LEVEL  # as a fraction of the side
_ROTATE = math.radians(30 * _LEVEL)
_ENHANCE = 0.9 * _LEVEL
_POSTERIZE_BITS = 8 - round(4 * _LEVEL)
_SOLARIZE = 255 * (1 - _LEVEL)


class RandAugment:
    """RandAugment(2, 9): two operations in a row, each drawn from fourteen, at strength 9 of 30.

    The operations and their strengths are those of the widespread implementation for 31 strength
    bins, nearest-neighbour resampling and black fill. Which image gets which operation is known on
    the host; the images of one operation are gathered and transformed together.

    Source: E. D. Cubuk, B. Zoph, J. Shlens, Q. V. Le, "RandAugment", CVPR Workshops 2020.
    """

    def __init__(self, n: int, generator: torch.Generator, device: torch.device) -> None:
        self._ops = torch.randint(len(_OPS), (_NUM_OPS, n), generator=generator)
        negative = torch.randint(2, (_NUM_OPS, n), generator=generator, dtype=torch.bool)
        self._signs = torch.where(negative, -1.0, 1.0).to(device)

    def __call__(self, images: Tensor, start: int) -> Tensor:
        chosen = slice(start, start + len(images))
        for ops, signs in zip(self._ops[:, chosen], self._signs[:, chosen], strict=True):
            images = _apply_each(images, ops, signs)
        return images


def _apply_each(images: Tensor, ops: Tensor, signs: Tensor) -> Tensor:
    """Apply operation `ops[i]` (on the host) with sign `signs[i]` (on the device) to image i."""
    order = torch.argsort(ops, stable=True)
    counts = torch.bincount(ops, minlength=len(_OPS)).tolist()
    if images.is_cuda:
        order = order.pin_memory()  # otherwise the copy may wait for the device
    groups = order.to(images.device, non_blocking=True).split(counts)
    result = images.clone()
    for op, index in zip(_OPS, groups, strict=True):
        if op != "identity" and len(index) > 0:
            result[index] = apply(op, images[index], signs[index])
    return result


def apply(op: str, images: Tensor, sign: Tensor) -> Tensor:
    """Apply one operation at strength 9 to images (b, 3, h, w) in uint8; `sign` is (b,), +1 or -1.

    The sign reverses the direction of a geometric operation and turns an enhancement into a
    reduction; the other operations ignore it.
    """
    if op in _GEOMETRIC:
        return _warp(images, _inverse_matrix(op, sign, images.shape[-2:]))
    if op == "posterize":
        return images & (256 - 2 ** (8 - _POSTERIZE_BITS))
    if op == "solarize":
        return torch.where(images >= _SOLARIZE, 255 - images, images)
    if op == "autocontrast":
        return _autocontrast(images)
    if op == "equalize":
        return _equalize(images)
    pixels = images.float()
    factor = (1 + _ENHANCE * sign).view(-1, 1, 1, 1)
    return (factor * pixels + (1 - factor) * _base(op, pixels)).clamp(0, 255).to(torch.uint8)


def _base(op: str, pixels: Tensor) -> Tensor:
    """The image that an enhancement moves away from."""
    if op == "brightness":
        return torch.zeros_like(pixels)
    if op == "color":
        return _gray(pixels)
    if op == "contrast":
        return _gray(pixels).mean((2, 3), keepdim=True).round()
    return _smooth(pixels)


def _inverse_matrix(op: str, sign: Tensor, size: torch.Size) -> Tensor:
    """(b, 2, 3): where each output pixel comes from, in pixels, origin at the image centre.

    A shear keeps the top left corner in place.
    """
    h, w = size
    zero, one = torch.zeros_like(sign), torch.ones_like(sign)
    a, b, c, d, x, y = one, zero, zero, one, zero, zero
    if op == "shear-x":
        b = _SHEAR * sign
        x = b * (h / 2)
    elif op == "shear-y":
        c = _SHEAR * sign
        y = c * (w / 2)
    elif op == "translate-x":
        x = sign * -float(int(_TRANSLATE * w))
    elif op == "translate-y":
        y = sign * -float(int(_TRANSLATE * h))
    else:
        a = d = one * math.cos(_ROTATE)
        b, c = sign * math.sin(_ROTATE), sign * -math.sin(_ROTATE)
    return torch.stack([torch.stack([a, b, x], -1), torch.stack([c, d, y], -1)], 1)


def _warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Nearest-neighbour resampling; pixels from outside the image are black."""
    h, w = images.shape[-2:]
    y = torch.arange(h, device=images.device, dtype=torch.float32) - (h - 1) / 2
    x = torch.arange(w, device=images.device, dtype=torch.float32) - (w - 1) / 2
    grid = torch.stack(
        [x.expand(h, w), y[:, None].expand(h, w), torch.ones(h, w, device=images.device)], -1
    )
    source = torch.einsum("hwk,bjk->bjhw", grid, matrix)
    column = (source[:, 0] + w / 2).floor().long()
    row = (source[:, 1] + h / 2).floor().long()
    inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
    position = row.clamp(0, h - 1) * w + column.clamp(0, w - 1)
    taken = images.flatten(2).gather(2, position.flatten(1)[:, None].expand(-1, 3, -1))
    return taken.view_as(images) * inside[:, None]


def _gray(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round()


def _smooth(pixels: Tensor) -> Tensor:
    """A 3 x 3 mean with centre weight 5/13; the pixels on the edge stay."""
    kernel = torch.ones(3, 1, 3, 3, device=pixels.device)
    kernel[:, :, 1, 1] = 5
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = (F.conv2d(pixels, kernel, groups=3) / 13).round()
    return smooth


def _autocontrast(images: Tensor) -> Tensor:
    pixels = images.float()
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    scale = 255 / (high - low).clamp(min=1)
    stretched = ((pixels - low) * scale).clamp(0, 255).to(torch.uint8)
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor) -> Tensor:
    """Map every channel so that its histogram becomes flat, in exact integer arithmetic."""
    b, c, h, w = images.shape
    flat = images.reshape(b * c, h * w).long()
    histogram = torch.zeros(b * c, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(1, flat, torch.ones_like(flat))
    brightest = histogram.gather(1, flat.amax(1, keepdim=True))
    step = (h * w - brightest) // 255
    below = F.pad(histogram.cumsum(1), (1, 0))[:, :-1]
    table = ((below + step // 2) // step.clamp(min=1)).clamp(0, 255)
    equal = table.gather(1, flat).view_as(images).to(torch.uint8)
    return torch.where((step > 0).view(b, c, 1, 1), equal, images)
