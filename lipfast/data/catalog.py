"""Data sets by name."""

from __future__ import annotations

import os
from pathlib import Path

from . import cifar, digits, tiny_imagenet
from .dataset import Dataset

NAMES = ("digits", "cifar10", "cifar100", "tiny-imagenet")


def load(name: str, root: Path | str | None = None) -> tuple[Dataset, Dataset]:
    """Read a data set into memory, as a training and a test set. Nothing is downloaded.

    Args:
        name: "digits" (the 1797 real 8 x 8 images that scikit-learn carries, 1437 to train and 360
            to test), "cifar10", "cifar100" (their published binary archive or its extracted
            folder) or "tiny-imagenet" (its published folder, whose validation images are the test
            set).
        root: folder that holds the archive or the folder; default `$LIPFAST_DATA`, else `./data`.
            Unused for "digits".

    Raises:
        ValueError: unknown name; a file that is not the published one.
        FileNotFoundError: a file is missing; the message says which, where it was sought and what
            it should be.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "digits":
        return digits.load()
    folder = Path(root if root is not None else os.environ.get("LIPFAST_DATA", "data"))
    if name == "tiny-imagenet":
        return tiny_imagenet.load(folder)
    return cifar.load(name, folder)
