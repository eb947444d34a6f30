"""Every batched operation against Pillow, image by image."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from lipfast.data import randaugment
from lipfast.data.randaugment import _OPS, RandAugment, apply

SIDE = 64
STRENGTH = 9 / 30


def make_images(n=6):
    """Noise, smooth gradients of small contrast, and a constant image."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (n - 3, SIDE, SIDE, 3))
    ramp = np.linspace(40, 170, SIDE)
    gradient = np.stack([np.add.outer(ramp, ramp[::-1] / 4), *[np.add.outer(ramp / 3, ramp)] * 2])
    dark = rng.integers(0, 30, (1, SIDE, SIDE, 3))
    flat = np.full((1, SIDE, SIDE, 3), 77)
    images = np.concatenate([noise, gradient.transpose(1, 2, 0)[None], dark, flat])
    return images.astype(np.uint8)


def with_pillow(op, image, sign):
    """The operation at strength 9 of 30, in Pillow's own terms."""
    size, nearest = (SIDE, SIDE), Image.Resampling.NEAREST

    def affine(*matrix):
        return image.transform(size, Image.Transform.AFFINE, matrix, resample=nearest)

    shear, shift = sign * 0.3 * STRENGTH, sign * int(150 / 331 * SIDE * STRENGTH)
    factor = 1 + sign * 0.9 * STRENGTH
    return {
        "identity": lambda: image,
        "shear-x": lambda: affine(1, shear, 0, 0, 1, 0),
        "shear-y": lambda: affine(1, 0, 0, shear, 1, 0),
        "translate-x": lambda: affine(1, 0, -shift, 0, 1, 0),
        "translate-y": lambda: affine(1, 0, 0, 0, 1, -shift),
        "rotate": lambda: image.rotate(-sign * 30 * STRENGTH, resample=nearest),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(9 / (30 / 4))),
        "solarize": lambda: ImageOps.solarize(image, math.ceil(255 * (1 - STRENGTH))),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[op]()


EXACT = {"translate-x", "translate-y", "posterize", "solarize", "equalize"}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", _OPS[1:])
def test_operation_matches_pillow(op, sign):
    images = make_images()
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    ours = apply(op, batch, torch.full((len(batch),), float(sign)))
    assert ours.dtype == torch.uint8
    assert ours.shape == batch.shape
    for image, result in zip(images, ours, strict=True):
        expected = np.asarray(with_pillow(op, Image.fromarray(image), sign)).astype(int)
        difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected)
        if op in EXACT:
            assert difference.max() == 0
        elif op in randaugment._GEOMETRIC:
            # Pillow steps in fixed point: a position near a pixel border may fall either way.
            assert (difference.max(-1) > 0).mean() < 0.01
        else:
            # Pillow blends in float32 and rounds the intermediate image: at most one grey level.
            assert difference.max() <= 1


def test_each_image_gets_its_own_operations():
    n = 200
    batch = torch.from_numpy(make_images(n)).permute(0, 3, 1, 2)
    augment = RandAugment(n, torch.Generator().manual_seed(0), torch.device("cpu"))
    result = augment(batch[50:150], 50)
    for i in range(50, 150):
        expected = batch[i : i + 1]
        for slot in range(2):
            op = _OPS[augment._ops[slot, i]]
            if op != "identity":
                expected = apply(op, expected, augment._signs[slot, i : i + 1])
        assert torch.equal(result[i - 50], expected[0])


def test_operations_are_drawn_uniformly():
    augment = RandAugment(14000, torch.Generator().manual_seed(0), torch.device("cpu"))
    counts = augment._ops.flatten().bincount(minlength=14)
    assert len(counts) == 14
    # Binomial with mean 2000: six standard deviations.
    assert (counts - 2000).abs().max() < 6 * math.sqrt(2000)
    assert (augment._signs == 1).float().mean() == pytest.approx(0.5, abs=0.02)


def test_input_is_not_changed():
    batch = torch.from_numpy(make_images()).permute(0, 3, 1, 2).contiguous()
    before = batch.clone()
    RandAugment(6, torch.Generator().manual_seed(1), torch.device("cpu"))(batch, 0)
    assert torch.equal(batch, before)


def test_empty_batch():
    augment = RandAugment(6, torch.Generator().manual_seed(1), torch.device("cpu"))
    assert augment(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), 3).shape == (0, 3, 8, 8)
