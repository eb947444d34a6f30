"""CIFAR-10 and CIFAR-100 from their published binary archives. No pickle is ever read."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .dataset import Dataset

_PIXELS = 3 * 32 * 32


class _Publication(NamedTuple):
    """What the authors published: names, record layout and checksums."""

    archive: str
    archive_md5: str
    folder: str
    class_file: str
    n_classes: int
    label_bytes: int  # the last of them is the label that is used
    records_per_file: dict[str, int]
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    file_sha1: dict[str, str]


_PUBLICATIONS = {
    "cifar10": _Publication(
        archive="cifar-10-binary.tar.gz",
        archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin",
        class_file="batches.meta.txt",
        n_classes=10,
        label_bytes=1,
        records_per_file={
            **{f"data_batch_{i}.bin": 10000 for i in range(1, 6)},
            "test_batch.bin": 10000,
        },
        train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test_files=("test_batch.bin",),
        file_sha1={
            "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
            "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
            "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
            "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
            "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
            "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
        },
    ),
    "cifar100": _Publication(
        archive="cifar-100-binary.tar.gz",
        archive_md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary",
        class_file="fine_label_names.txt",
        n_classes=100,
        label_bytes=2,
        records_per_file={"train.bin": 50000, "test.bin": 10000},
        train_files=("train.bin",),
        test_files=("test.bin",),
        file_sha1={
            "train.bin": "e207cd2e05b73b1393c74c7f5e7bea451d63e08e",
            "test.bin": "8fb6623e830365ff53cf14adec797474f5478006",
        },
    ),
}
_URL = "https://www.cs.toronto.edu/~kriz/"


def load(name: str, root: Path) -> tuple[Dataset, Dataset]:
    """Read "cifar10" or "cifar100": 50000 training and 10000 test images of shape (3, 32, 32).

    `root` holds either the published archive, which is read without being extracted, or the folder
    that it extracts to; the folder is taken when both are there. CIFAR-100 has its 100 fine labels.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Raises:
        FileNotFoundError: neither the archive nor the folder, or a file of the folder, is there.
        ValueError: wrong checksum, size, label or class names.
    """
    publication = _PUBLICATIONS[name]
    folder, archive = root / publication.folder, root / publication.archive
    if folder.is_dir():
        files = _read_folder(folder, publication)
    elif archive.is_file():
        files = _read_archive(archive, publication)
    else:
        raise FileNotFoundError(
            f"{name} is not in {root.resolve()}: sought the folder {publication.folder} and the "
            f"archive {publication.archive} (md5 {publication.archive_md5}), which is published at "
            f"{_URL}{publication.archive}"
        )
    where = folder if folder.is_dir() else archive
    classes = _class_names(files[publication.class_file], publication, where)
    return (
        _dataset(name, files, publication.train_files, publication, classes, where),
        _dataset(name, files, publication.test_files, publication, classes, where),
    )


def _read_folder(folder: Path, publication: _Publication) -> dict[str, bytes]:
    files = {}
    for file in (publication.class_file, *publication.records_per_file):
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: {folder} must hold the files of {publication.archive}"
            )
        files[file] = path.read_bytes()
        if file == publication.class_file:
            continue
        _check_size(file, str(path), len(files[file]), publication)
        sha1 = hashlib.sha1(files[file], usedforsecurity=False).hexdigest()
        if sha1 != publication.file_sha1[file]:
            raise ValueError(
                f"{path} has sha1 {sha1}, expected {publication.file_sha1[file]}: it is not the "
                f"published file; extract {publication.archive} again"
            )
    return files


def _read_archive(archive: Path, publication: _Publication) -> dict[str, bytes]:
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != publication.archive_md5:
        raise ValueError(
            f"{archive} has md5 {digest.hexdigest()}, expected {publication.archive_md5}: it is "
            f"damaged or not the archive published at {_URL}{publication.archive}"
        )
    wanted = {
        f"{publication.folder}/{file}": file
        for file in (publication.class_file, *publication.records_per_file)
    }
    files = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            file = wanted.get(member.name)
            if file is None or not member.isfile():
                continue
            if file != publication.class_file:
                _check_size(file, f"{member.name} in {archive}", member.size, publication)
            content = tar.extractfile(member)
            assert content is not None  # a regular file always has content
            files[file] = content.read()
    missing = [member for member, file in wanted.items() if file not in files]
    if missing:
        raise ValueError(f"{archive} does not contain {', '.join(missing)}")
    return files


def _check_size(file: str, where: str, size: int, publication: _Publication) -> None:
    records, record_bytes = publication.records_per_file[file], publication.label_bytes + _PIXELS
    if size != records * record_bytes:
        raise ValueError(
            f"{where} has {size} bytes, expected {records * record_bytes}: {records} records of "
            f"{record_bytes} bytes"
        )


def _class_names(content: bytes, publication: _Publication, where: Path) -> tuple[str, ...]:
    names = tuple(content.decode("ascii", errors="replace").split())
    if len(names) != publication.n_classes:
        raise ValueError(
            f"{publication.class_file} of {where} has {len(names)} class names, expected "
            f"{publication.n_classes}"
        )
    return names


def _dataset(
    name: str,
    files: dict[str, bytes],
    chosen: tuple[str, ...],
    publication: _Publication,
    classes: tuple[str, ...],
    where: Path,
) -> Dataset:
    images, labels = [], []
    for file in chosen:
        records = np.frombuffer(files[file], dtype=np.uint8)
        records = records.reshape(-1, publication.label_bytes + _PIXELS)
        label = records[:, publication.label_bytes - 1]
        if label.max() >= publication.n_classes:
            record = int(np.argmax(label >= publication.n_classes))
            raise ValueError(
                f"{file} of {where} has label {label[record]} in record {record}, expected "
                f"0..{publication.n_classes - 1}"
            )
        labels.append(label.astype(np.int64))
        images.append(records[:, publication.label_bytes :].reshape(-1, 3, 32, 32))
    return Dataset(
        name=name,
        images=torch.from_numpy(np.concatenate(images)),
        labels=torch.from_numpy(np.concatenate(labels)),
        classes=classes,
    )
