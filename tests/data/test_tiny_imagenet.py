"""A folder in the published layout with 3 classes, 4 training images each, 5 to validate."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from lipfast.data import load, tiny_imagenet

CLASSES = ("n00000003", "n00000001", "n00000002")
SPLITS = {"train": 12, "val": 5}


def write_image(path, color, mode="RGB", size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, format="JPEG", quality=95)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        tiny_imagenet,
        "_PUBLICATION",
        tiny_imagenet._Publication(classes=3, train_per_class=4, validation=5),
    )
    root = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(CLASSES):
        for i in range(4):
            write_image(root / "train" / name / "images" / f"{name}_{i}.JPEG", (80 * label, 9, i))
    lines = []
    for i in range(5):
        write_image(root / "val" / "images" / f"val_{i}.JPEG", 50 * i, mode="L")
        lines.append(f"val_{i}.JPEG\t{CLASSES[i % 3]}\t0\t0\t10\t10\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def test_reads_both_splits(folder):
    train, test = load("tiny-imagenet", folder.parent)
    assert train.classes == CLASSES
    assert train.images.shape == (12, 3, 64, 64)
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    red = train.images[:, 0].float().mean((1, 2))
    assert ((red - 80 * train.labels).abs() < 3).all()
    assert test.labels.tolist() == [0, 1, 2, 0, 1]
    # Grayscale becomes three equal channels.
    assert (test.images[:, 0] == test.images[:, 2]).all()
    gray = test.images[:, 0, 5, 5].int() - torch.arange(0, 250, 50)
    assert (gray.abs() < 3).all()


def test_second_read_comes_from_the_cache(folder, monkeypatch):
    first, _ = load("tiny-imagenet", folder.parent)
    assert len(list(folder.glob("lipfast-*.npy"))) == 2
    monkeypatch.setattr(tiny_imagenet, "_decode", lambda path: pytest.fail("decoded again"))
    second, _ = load("tiny-imagenet", folder.parent)
    assert (first.images == second.images).all()


def test_stale_cache_is_replaced(folder):
    load("tiny-imagenet", folder.parent)
    before = set(folder.glob("lipfast-train-*.npy"))
    write_image(folder / "train" / CLASSES[0] / "images" / f"{CLASSES[0]}_0.JPEG", (255, 255, 255))
    train, _ = load("tiny-imagenet", folder.parent)
    assert train.images[0].min() > 250
    after = set(folder.glob("lipfast-train-*.npy"))
    assert len(after) == 1
    assert after != before


def test_touched_image_is_decoded_again(folder):
    load("tiny-imagenet", folder.parent)
    before = set(folder.glob("lipfast-val-*.npy"))
    os.utime(folder / "val" / "images" / "val_0.JPEG", ns=(1, 1))
    load("tiny-imagenet", folder.parent)
    assert before.isdisjoint(folder.glob("lipfast-val-*.npy"))


def test_broken_cache_is_rebuilt(folder):
    first, _ = load("tiny-imagenet", folder.parent)
    (cache,) = folder.glob("lipfast-train-*.npy")
    for content in (b"", cache.read_bytes()[:1000], b"not an array"):
        cache.write_bytes(content)
        again, _ = load("tiny-imagenet", folder.parent)
        assert (again.images == first.images).all()
        assert np.load(cache).shape == (12, 3, 64, 64)


def test_pickled_cache_is_not_executed(folder):
    first, _ = load("tiny-imagenet", folder.parent)
    (cache,) = folder.glob("lipfast-train-*.npy")

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    np.save(cache, np.array([Bomb()], dtype=object), allow_pickle=True)
    again, _ = load("tiny-imagenet", folder.parent)
    assert (again.images == first.images).all()
    assert not (folder / "exploded").exists()


def test_cache_that_cannot_be_written_is_a_warning(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    monkeypatch.setattr(np, "save", refuse)
    with pytest.warns(RuntimeWarning, match="not cached: read-only"):
        train, _ = load("tiny-imagenet", folder.parent)
    assert len(train) == 12


def break_missing_list(folder):
    (folder / "wnids.txt").unlink()


def break_class_count(folder):
    (folder / "wnids.txt").write_text("n1\nn2\n")


def break_class_folder(folder):
    (folder / "train" / CLASSES[1]).rename(folder / "train" / "other")


def break_image_count(folder):
    (folder / "train" / CLASSES[1] / "images" / f"{CLASSES[1]}_3.JPEG").unlink()


def break_image(folder):
    path = folder / "train" / CLASSES[2] / "images" / f"{CLASSES[2]}_1.JPEG"
    path.write_bytes(path.read_bytes()[:300])


def break_image_size(folder):
    write_image(folder / "val" / "images" / "val_2.JPEG", 0, mode="L", size=(32, 64))


def break_missing_validation_image(folder):
    (folder / "val" / "images" / "val_3.JPEG").unlink()


def break_annotation_class(folder):
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace(CLASSES[1], "n9"))


def break_annotation_path(folder):
    path = folder / "val" / "val_annotations.txt"
    path.write_text(path.read_text().replace("val_1", "../val_1"))


def break_annotation_count(folder):
    path = folder / "val" / "val_annotations.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_missing_list, FileNotFoundError, r"wnids.txt is missing"),
        (break_class_count, ValueError, r"wnids.txt must list 3 different class ids.*got 2"),
        (break_class_folder, FileNotFoundError, r"n00000001/images is missing"),
        (break_image_count, ValueError, r"has 3 .JPEG files, expected 4"),
        (break_image, ValueError, r"n00000002_1.JPEG cannot be decoded"),
        (break_image_size, ValueError, r"val_2.JPEG is 32 x 64 pixels, expected 64 x 64"),
        (break_missing_validation_image, FileNotFoundError, r"val_3.JPEG is missing"),
        (break_annotation_class, ValueError, r"val_annotations.txt, line 2: expected .*n9"),
        (break_annotation_path, ValueError, r"val_annotations.txt, line 2: expected .*\.\./val_1"),
        (break_annotation_count, ValueError, r"names 4 images, expected 5"),
    ],
)
def test_damage_is_named(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        load("tiny-imagenet", folder.parent)
