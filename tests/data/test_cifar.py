"""Synthetic archives in the published layout, with small record counts and their own checksums."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from lipfast.data import cifar, load

RECORDS = 7


def make_files(name, seed=0):
    publication = cifar._PUBLICATIONS[name]
    rng = np.random.default_rng(seed)
    names = "".join(f"class{i}\n" for i in range(publication.n_classes)) + "\n"
    files = {publication.class_file: names.encode()}
    for file in publication.records_per_file:
        records = rng.integers(0, 256, (RECORDS, publication.label_bytes + 3072), dtype=np.uint8)
        records[:, 0] = rng.integers(0, 10, RECORDS)
        records[:, publication.label_bytes - 1] = rng.integers(0, publication.n_classes, RECORDS)
        files[file] = records.tobytes()
    return files


def write_archive(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for file, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def publish(monkeypatch, name, files, archive=None):
    publication = cifar._PUBLICATIONS[name]
    monkeypatch.setitem(
        cifar._PUBLICATIONS,
        name,
        publication._replace(
            archive_md5=hashlib.md5(archive.read_bytes()).hexdigest() if archive else "0" * 32,
            records_per_file=dict.fromkeys(publication.records_per_file, RECORDS),
            file_sha1={f: hashlib.sha1(c).hexdigest() for f, c in files.items()},
        ),
    )


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request):
    return request.param


@pytest.fixture
def archive(name, tmp_path, monkeypatch):
    publication = cifar._PUBLICATIONS[name]
    path = tmp_path / publication.archive
    files = make_files(name)
    write_archive(path, publication.folder, files)
    publish(monkeypatch, name, files, path)
    return path


@pytest.fixture
def folder(name, tmp_path, monkeypatch):
    path = tmp_path / cifar._PUBLICATIONS[name].folder
    path.mkdir()
    files = make_files(name)
    for file, content in files.items():
        (path / file).write_bytes(content)
    publish(monkeypatch, name, files)
    return path


def check(name, root):
    publication = cifar._PUBLICATIONS[name]
    train, test = load(name, root)
    files = make_files(name)
    for data, chosen in ((train, publication.train_files), (test, publication.test_files)):
        assert data.name == name
        assert data.classes == tuple(f"class{i}" for i in range(publication.n_classes))
        assert data.images.shape == (RECORDS * len(chosen), 3, 32, 32)
        raw = b"".join(files[file] for file in chosen)
        step = publication.label_bytes + 3072
        for i in (0, len(data) - 1):
            record = raw[i * step : (i + 1) * step]
            assert data.labels[i] == record[publication.label_bytes - 1]
            # Row-major planes: red first, then green, then blue.
            assert data.images[i, 1, 2, 3] == record[publication.label_bytes + 1024 + 2 * 32 + 3]


def test_archive(name, archive):
    check(name, archive.parent)
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


def test_folder(name, folder):
    check(name, folder.parent)


def test_published_sizes():
    for publication in cifar._PUBLICATIONS.values():
        counts = publication.records_per_file
        assert sum(counts[file] for file in publication.train_files) == 50000
        assert sum(counts[file] for file in publication.test_files) == 10000
        assert set(publication.file_sha1) == set(counts)


def test_nothing_there(name, tmp_path):
    publication = cifar._PUBLICATIONS[name]
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    for part in (str(tmp_path), publication.archive, publication.folder, publication.archive_md5):
        assert part in str(caught.value)


def test_truncated_archive(name, archive):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{archive.name} has md5 .*, expected .*damaged"):
        load(name, archive.parent)


def test_archive_that_extracts_elsewhere_is_refused(name, tmp_path, monkeypatch):
    publication = cifar._PUBLICATIONS[name]
    path, files = tmp_path / publication.archive, make_files(name)
    write_archive(path, "../" + publication.folder, files)
    publish(monkeypatch, name, files, path)
    with pytest.raises(ValueError, match=f"does not contain {publication.folder}/"):
        load(name, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_linked_member_is_refused(name, tmp_path, monkeypatch):
    publication = cifar._PUBLICATIONS[name]
    path, files = tmp_path / publication.archive, make_files(name)
    write_archive(path, publication.folder, {publication.class_file: files[publication.class_file]})
    (tmp_path / "secret").write_bytes(files[publication.test_files[0]])
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"{publication.folder}/{publication.test_files[0]}")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(info)
    publish(monkeypatch, name, files, path)
    with pytest.raises(ValueError, match="does not contain"):
        load(name, tmp_path)


def test_wrong_size_in_archive(name, tmp_path, monkeypatch):
    publication = cifar._PUBLICATIONS[name]
    path, files = tmp_path / publication.archive, make_files(name)
    file = publication.test_files[0]
    files[file] = files[file][:-1]
    write_archive(path, publication.folder, files)
    publish(monkeypatch, name, files, path)
    size = RECORDS * (publication.label_bytes + 3072)
    with pytest.raises(ValueError, match=f"{file} in .* has {size - 1} bytes, expected {size}"):
        load(name, tmp_path)


def test_missing_file_in_folder(name, folder):
    file = cifar._PUBLICATIONS[name].train_files[-1]
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        load(name, folder.parent)


def test_truncated_file_in_folder(name, folder):
    path = folder / cifar._PUBLICATIONS[name].test_files[0]
    path.write_bytes(path.read_bytes()[:3073])
    with pytest.raises(ValueError, match=f"{path.name} has 3073 bytes, expected"):
        load(name, folder.parent)


def test_wrong_checksum_in_folder(name, folder):
    path = folder / cifar._PUBLICATIONS[name].train_files[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{path.name} has sha1 .*, expected"):
        load(name, folder.parent)


def test_wrong_label(name, folder, monkeypatch):
    publication = cifar._PUBLICATIONS[name]
    files = make_files(name)
    file = publication.test_files[0]
    content = bytearray(files[file])
    step = publication.label_bytes + 3072
    content[3 * step + publication.label_bytes - 1] = publication.n_classes
    files[file] = bytes(content)
    (folder / file).write_bytes(files[file])
    publish(monkeypatch, name, files)
    wanted = f"{file} of .* has label {publication.n_classes} in record 3, expected 0"
    with pytest.raises(ValueError, match=wanted):
        load(name, folder.parent)


def test_wrong_number_of_classes(name, folder):
    publication = cifar._PUBLICATIONS[name]
    (folder / publication.class_file).write_text("only\ntwo\n")
    wanted = f"has 2 class names, expected {publication.n_classes}"
    with pytest.raises(ValueError, match=wanted):
        load(name, folder.parent)


def test_no_pickle_is_read(name, folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load(name, folder.parent)
