"""Tiny ImageNet from its published folder, decoded once and cached as an array."""

from __future__ import annotations

import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .dataset import Dataset
from .files import atomic_write

_FOLDER = "tiny-imagenet-200"
_SIDE = 64


class _Publication(NamedTuple):
    classes: int
    train_per_class: int
    validation: int


_PUBLICATION = _Publication(classes=200, train_per_class=500, validation=10000)


def load(root: Path) -> tuple[Dataset, Dataset]:
    """Read 100000 training images and 10000 validation images (the test set), (3, 64, 64) each.

    `root` holds the extracted folder `tiny-imagenet-200`. Grayscale images become RGB. The decoded
    pixels are cached in that folder as `lipfast-<split>-<key>.npy`; the key covers name, size and
    modification time of every image, so that a changed folder is decoded again.

    Source: Y. Le, X. Yang, "Tiny ImageNet Visual Recognition Challenge", Stanford CS231n, 2015.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: wrong number of classes or images, an unreadable image, a malformed list.
    """
    folder = root / _FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(
            f"tiny-imagenet is not in {root.resolve()}: sought the folder {_FOLDER}, extracted "
            "from http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        )
    classes = _class_ids(folder / "wnids.txt")
    return (
        _split("train", folder, classes, *_list_train(folder, classes)),
        _split("val", folder, classes, *_list_validation(folder, classes)),
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a text file of the published {_FOLDER}")
    return path.read_text(encoding="ascii", errors="replace").split("\n")


def _class_ids(path: Path) -> tuple[str, ...]:
    ids = tuple(line.strip() for line in _lines(path) if line.strip())
    if len(set(ids)) != _PUBLICATION.classes or not all(name.isalnum() for name in ids):
        raise ValueError(
            f"{path} must list {_PUBLICATION.classes} different class ids, one per line, got "
            f"{len(set(ids))} different ones in {len(ids)} lines"
        )
    return ids


def _list_train(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = folder / "train" / name / "images"
        if not images.is_dir():
            raise FileNotFoundError(f"{images} is missing: the training images of class {name}")
        found = sorted(images.glob("*.JPEG"))
        if len(found) != _PUBLICATION.train_per_class:
            raise ValueError(
                f"{images} has {len(found)} .JPEG files, expected {_PUBLICATION.train_per_class}"
            )
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _list_validation(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    path = folder / "val" / "val_annotations.txt"
    label_of = {name: label for label, name in enumerate(classes)}
    label_of_file: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        file, _, rest = line.partition("\t")
        name = rest.partition("\t")[0].strip()
        if Path(file).name != file or not file.endswith(".JPEG") or name not in label_of:
            raise ValueError(
                f"{path}, line {number}: expected a .JPEG file name and one of the class ids of "
                f"wnids.txt, separated by tabs, got {line!r}"
            )
        label_of_file[file] = label_of[name]
    if len(label_of_file) != _PUBLICATION.validation:
        raise ValueError(
            f"{path} names {len(label_of_file)} images, expected {_PUBLICATION.validation}"
        )
    return [path.parent / "images" / file for file in label_of_file], list(label_of_file.values())


def _split(
    split: str, folder: Path, classes: tuple[str, ...], paths: list[Path], labels: list[int]
) -> Dataset:
    cache = folder / f"lipfast-{split}-{_key(folder, paths)}.npy"
    shape = (len(paths), 3, _SIDE, _SIDE)
    pixels = _read_cache(cache, shape)
    if pixels is None:
        with ThreadPoolExecutor() as pool:
            pixels = np.stack(list(pool.map(_decode, paths)))
        _write_cache(cache, pixels, split)
    return Dataset(
        name="tiny-imagenet",
        images=torch.from_numpy(pixels),
        labels=torch.tensor(labels, dtype=torch.int64),
        classes=classes,
    )


def _key(folder: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is missing: an image of the published {_FOLDER}"
            ) from None
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _decode(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path, formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} cannot be decoded as JPEG: {error}") from error
    if pixels.shape != (_SIDE, _SIDE, 3):
        height, width = pixels.shape[:2]
        raise ValueError(f"{path} is {width} x {height} pixels, expected {_SIDE} x {_SIDE}")
    return pixels.transpose(2, 0, 1)


def _read_cache(cache: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached pixels, or None when there is no readable cache of that shape."""
    try:
        pixels = np.load(cache, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def _write_cache(cache: Path, pixels: np.ndarray, split: str) -> None:
    try:
        with atomic_write(cache) as temporary:
            np.save(temporary, pixels, allow_pickle=False)
        for other in cache.parent.glob(f"lipfast-{split}-*.npy"):
            if other != cache:
                other.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"decoded images are not cached: {error}", RuntimeWarning, stacklevel=4)
