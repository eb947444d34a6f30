import pytest
import torch

from lipfast.data import Dataset, DeviceLoader, channel_mean
from lipfast.data.augment import CropFlip

N = 23


def make_dataset(n=N, channels=3, side=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (n, channels, side, side), generator=generator).byte()
    labels = torch.arange(n) % 5
    return Dataset("toy", images, labels, tuple("abcde"))


def make_loader(dataset=None, batch_size=5, augment=None, train=True, **options):
    dataset = dataset or make_dataset()
    mean = channel_mean(dataset)
    return DeviceLoader(dataset, batch_size, mean=mean, train=train, augment=augment, **options)


def collect(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_test_loader_is_in_order_and_centred():
    data = make_dataset()
    loader = make_loader(data, train=False)
    assert len(loader) == 5
    assert [len(y) for _, y in loader] == [5, 5, 5, 5, 3]
    assert [loader.global_batch_size(step) for step in range(5)] == [5, 5, 5, 5, 3]
    x, y = collect(loader)
    expected = data.images.double() / 255 - channel_mean(data).double().view(1, 3, 1, 1)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=2**-23)
    assert torch.equal(y, data.labels)


def test_an_epoch_has_every_sample_once():
    data = make_dataset()
    x, y = collect(make_loader(data))
    pixels = (x + channel_mean(data).view(1, 3, 1, 1)).mul(255).round().byte()
    rows = dict(zip(map(tuple, pixels.flatten(1).tolist()), y.tolist(), strict=True))
    for image, label in zip(data.images.flatten(1).tolist(), data.labels.tolist(), strict=True):
        assert rows.pop(tuple(image)) == label
    assert not rows


@pytest.mark.parametrize("augment", [None, "crop-flip", "randaugment"])
def test_order_depends_on_seed_and_epoch_alone(augment):
    loader = make_loader(augment=augment, seed=3)
    first, second = collect(loader), collect(loader)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    loader.set_epoch(1)
    assert not torch.equal(collect(loader)[0], first[0])
    loader.set_epoch(0)
    assert torch.equal(collect(loader)[0], first[0])
    assert not torch.equal(collect(make_loader(augment=augment, seed=4))[0], first[0])


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = collect(make_loader(augment="randaugment"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(collect(make_loader(augment="randaugment"))[0], first[0])


@pytest.mark.parametrize("augment", [None, "crop-flip", "randaugment"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_together_see_the_batches_of_one_process(augment, world_size, train):
    augment = augment if train else None
    whole = list(make_loader(augment=augment, train=train))
    ranks = [
        list(make_loader(augment=augment, train=train, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for step, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([batches[step][0] for batches in ranks]), x)
        assert torch.equal(torch.cat([batches[step][1] for batches in ranks]), y)
        sizes = [len(batches[step][1]) for batches in ranks]
        assert max(sizes) - min(sizes) <= 1


def test_crop_and_flip_match_a_loop():
    data = make_dataset(n=40, side=6)
    crop = CropFlip(40, torch.Generator().manual_seed(2), torch.device("cpu"))
    result = crop(data.images[10:30], 10)
    for i in range(20):
        top, left, flip = (int(t[10 + i]) for t in (crop._top, crop._left, crop._flip))
        padded = torch.zeros(3, 14, 14, dtype=torch.uint8)
        padded[:, 4:10, 4:10] = data.images[10 + i]
        expected = padded[:, top : top + 6, left : left + 6]
        assert torch.equal(result[i], expected.flip(-1) if flip else expected)
    assert crop._top.min() == crop._left.min() == 0
    assert crop._top.max() == crop._left.max() == 8
    assert 0 < crop._flip.sum() < 40


def test_crop_keeps_non_square_maps():
    crop = CropFlip(4, torch.Generator().manual_seed(2), torch.device("cpu"))
    assert crop(torch.ones(4, 1, 5, 9, dtype=torch.uint8), 0).shape == (4, 1, 5, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"mean": torch.zeros(1)}, r"mean must have shape \(3,\), got \(1,\)"),
        (
            {"augment": "mixup"},
            "augment must be None or one of crop-flip, randaugment, got 'mixup'",
        ),
        ({"augment": "crop-flip", "train": False}, "augment must be None when train is False"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"rank": 2, "world_size": 2}, "rank must be in 0..world_size - 1, got rank 2"),
        ({"rank": -1, "world_size": 2}, "rank must be in 0..world_size - 1, got rank -1"),
        ({"world_size": 0}, "world_size 0"),
    ],
)
def test_rejects(options, message):
    options = {"batch_size": 4, "mean": torch.zeros(3), "train": True, "augment": None} | options
    with pytest.raises(ValueError, match=message):
        DeviceLoader(make_dataset(), **options)


def test_rejects_gray_randaugment_and_negative_epoch():
    with pytest.raises(ValueError, match="needs 3 channels"):
        make_loader(make_dataset(channels=1), augment="randaugment")
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        make_loader().set_epoch(-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augment", [None, "crop-flip", "randaugment"])
def test_batches_on_a_gpu_equal_those_on_the_cpu_and_never_synchronise(augment):
    expected = collect(make_loader(augment=augment))
    loader = make_loader(augment=augment, device="cuda")
    batches = iter(loader)
    collected = [next(batches)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        collected += list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    x = torch.cat([x for x, _ in collected]).cpu()
    # Interpolation weights and means may round differently: one grey level in few pixels.
    assert ((x - expected[0]).abs() > 1.5 / 255).float().mean() < 0.01
    assert torch.equal(torch.cat([y for _, y in collected]).cpu(), expected[1])
