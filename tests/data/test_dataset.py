import pytest
import torch

from lipfast.data import Dataset, channel_mean, load

IMAGES = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
LABELS = torch.tensor([0, 1])


def test_properties():
    data = Dataset("toy", IMAGES, LABELS, ("a", "b", "c"))
    assert data.n_classes == 3
    assert data.input_size == (3, 4, 5)
    assert len(data) == 2


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (IMAGES.float(), LABELS, TypeError, "images must be uint8, got torch.float32"),
        (IMAGES, LABELS.int(), TypeError, "labels must be int64, got torch.int32"),
        (IMAGES[0], LABELS, ValueError, r"shape \(n, c, h, w\), got \(3, 4, 5\)"),
        (IMAGES[:0], LABELS[:0], ValueError, "non-empty"),
        (IMAGES, LABELS[:1], ValueError, r"labels must have shape \(2,\), got \(1,\)"),
        (IMAGES, LABELS + 1, ValueError, r"labels must be in 0..1, got values from 1 to 2"),
        (IMAGES, LABELS - 1, ValueError, r"labels must be in 0..1, got values from -1 to 0"),
    ],
)
def test_rejects(images, labels, error, message):
    with pytest.raises(error, match=message):
        Dataset("toy", images, labels, ("a", "b"))


def test_channel_mean_matches_float64():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    data = Dataset("toy", images, torch.zeros(50, dtype=torch.int64), ("a",))
    expected = (images.double() / 255).mean((0, 2, 3))
    mean = channel_mean(data)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), expected, rtol=2**-23, atol=0)


def test_digits():
    from sklearn.datasets import load_digits

    train, test = load("digits")
    assert (len(train), len(test)) == (1437, 360)
    assert train.input_size == (1, 8, 8)
    assert train.classes == tuple("0123456789")
    assert int(train.images.max()) == 255
    # Stratified: each class has a fifth of its images in the test set.
    total = train.labels.bincount() + test.labels.bincount()
    assert (test.labels.bincount() - total / 5).abs().max() < 1
    # Together they are scikit-learn's images, each exactly once.
    ours = torch.cat([train.images, test.images]).flatten(1).float() * (16 / 255)
    theirs = torch.from_numpy(load_digits().data).float()
    assert sorted(ours.round().tolist()) == sorted(theirs.tolist())
    again, _ = load("digits")
    assert torch.equal(again.images, train.images)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name must be one of digits, cifar10.*got 'mnist'"):
        load("mnist")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_root_from_the_environment(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LIPFAST_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=f"{name} is not in .*elsewhere: sought"):
        load(name)
