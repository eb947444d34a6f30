"""The handwritten digits that scikit-learn carries."""

from __future__ import annotations

import numpy as np
import torch

from .dataset import Dataset


def load() -> tuple[Dataset, Dataset]:
    """1797 real 8 x 8 digits in one channel, as 1437 training and 360 test images.

    The test set is a held-out fifth, stratified by class, always the same one. Pixel values 0 to 16
    are rescaled to round(255 v / 16).

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    values, labels = load_digits(return_X_y=True)
    pixels = np.round(values * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    return _subset(pixels, labels, np.sort(train)), _subset(pixels, labels, np.sort(test))


def _subset(pixels: np.ndarray, labels: np.ndarray, index: np.ndarray) -> Dataset:
    return Dataset(
        name="digits",
        images=torch.from_numpy(pixels[index]),
        labels=torch.from_numpy(labels[index].astype(np.int64)),
        classes=tuple("0123456789"),
    )
