import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lipfast.data import Dataset, DeviceLoader, channel_mean
from lipfast.models import ConvNet
from lipfast.training import (
    TrainConfig,
    TrainingDiverged,
    load_checkpoint,
    load_model,
    margin_cross_entropy,
    one_cycle,
    train,
)

N, BATCH = 45, 16
CONFIG = {"epochs": 3, "lr": 0.1, "weight_decay": 1e-3, "batch_size": BATCH}


def make_dataset():
    """Three classes of noisy stripes that a small network learns."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    images = torch.randint(0, 120, (N, 1, 4, 4), generator=generator)
    for i, label in enumerate(labels.tolist()):
        images[i, :, label] += 120
    return Dataset("stripes", images.byte(), labels, ("a", "b", "c"))


def make_loader(augment="crop-flip", **options):
    data = make_dataset()
    options = {"batch_size": BATCH, "train": True, "augment": augment} | options
    return DeviceLoader(data, mean=channel_mean(data), **options)


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def run(model=None, loader=None, config=None, **options):
    model = model or make_model()
    result = train(
        model,
        loader or make_loader(),
        config or TrainConfig(**CONFIG),
        progress=False,
        **options,
    )
    return model, result


def assert_same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def by_hand(dtype, weight_decay=1e-3, lr=0.1, momentum=0.9, epochs=3):
    """The same training written out, without torch.optim."""
    model, loader, velocity, means, step = make_model().to(dtype), make_loader(), None, [], 0
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        total = 0.0
        for x, y in loader:
            loss = margin_cross_entropy(model(x.to(dtype)), y)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                grads = [
                    g + weight_decay * p for g, p in zip(grads, model.parameters(), strict=True)
                ]
                if velocity is None:
                    velocity = grads
                else:
                    velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
                rate = one_cycle(step, epochs * len(loader), lr)
                for p, v in zip(model.parameters(), velocity, strict=True):
                    p -= rate * v
            total += loss.item() * len(y)
            step += 1
        means.append(total / N)
    return model, means


def test_matches_a_training_loop_written_out():
    model, result = run()
    plain, plain_losses = by_hand(torch.float32)
    exact, exact_losses = by_hand(torch.float64)
    for ours, theirs, truth in zip(result.losses, plain_losses, exact_losses, strict=True):
        assert abs(ours - truth) <= 2 * abs(theirs - truth) + 1e-6
    for ours, theirs, truth in zip(
        model.parameters(), plain.parameters(), exact.parameters(), strict=True
    ):
        error = (theirs.double() - truth).abs().max()
        assert (ours.double() - truth).abs().max() <= 2 * error + 1e-6


def test_result():
    calls = []
    model, result = run(on_epoch=lambda epoch, loss: calls.append((epoch, loss)))
    assert not model.training
    assert result.epochs == len(result.losses) == 3
    assert calls == list(enumerate(result.losses, start=1))
    assert result.seconds > 0
    assert result.seconds_per_epoch == result.seconds / 3
    assert result.peak_memory_bytes is None


def test_learns():
    config = TrainConfig(**CONFIG | {"epochs": 30, "lr": 0.3})
    model, result = run(loader=make_loader(augment=None), config=config)
    data = make_dataset()
    x = data.images.float() / 255 - channel_mean(data)
    assert (model(x).argmax(1) == data.labels).float().mean() > 0.95
    assert result.losses[-1] < result.losses[0] / 2


def test_repeatable_and_without_global_random_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, first_result = run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    second, second_result = run()
    assert first_result.losses == second_result.losses
    assert_same_state(first, second)
    _, other = run(loader=make_loader(seed=1), config=TrainConfig(**CONFIG, seed=1))
    assert other.losses != first_result.losses


def interrupt(after, path, model=None, **options):
    """Train until `after` epochs are done, then fail as a killed process would."""

    class Killed(Exception):
        pass

    def stop(epoch, loss):
        if epoch == after:
            raise Killed

    with pytest.raises(Killed):
        run(model, checkpoint_dir=path, on_epoch=stop, **options)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, after):
    whole, whole_result = run(checkpoint_dir=tmp_path / "whole")
    interrupt(after, tmp_path / "part")
    resumed, result = run(checkpoint_dir=tmp_path / "part", resume=True)
    assert result.losses == whole_result.losses
    assert_same_state(resumed, whole)
    first = load_checkpoint(tmp_path / "whole" / "last.safetensors")
    second = load_checkpoint(tmp_path / "part" / "last.safetensors")
    assert first.momentum.keys() == second.momentum.keys() == dict(whole.named_parameters()).keys()
    for name, tensor in first.momentum.items():
        assert torch.equal(tensor, second.momentum[name])


@pytest.mark.parametrize("method", ["aol", "bcop", "cayley", "cpl", "lot", "sll", "soc"])
def test_resumed_convnet_equals_an_uninterrupted_one(tmp_path, method):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return ConvNet(
                method, None, width=4, layers_per_block=1, input_size=(1, 4, 4), n_classes=3
            )

    config = TrainConfig(**CONFIG | {"epochs": 2, "lr": 0.05})
    whole, whole_result = run(make(), config=config)
    interrupt(1, tmp_path, make(), config=config)
    resumed, result = run(make(), config=config, checkpoint_dir=tmp_path, resume=True)
    assert result.losses == whole_result.losses
    assert_same_state(resumed, whole)
    loaded, metadata = load_model(tmp_path / "last.safetensors")
    assert_same_state(loaded, whole)
    assert metadata["epoch"] == 2
    assert metadata["step"] == 6
    assert metadata["data"] == {"name": "stripes", "images": N, "augment": "crop-flip"}


def test_resume_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="resume needs checkpoint_dir"):
        run(resume=True)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*last.safetensors"):
        run(checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("config", "loader", "message"),
    [
        ({"lr": 0.2}, {}, "its config has lr = 0.1, this run has 0.2"),
        ({"epochs": 4}, {}, "its config has epochs = 3, this run has 4"),
        ({"seed": 3}, {"seed": 3}, "its config has seed = 0, this run has 3"),
        ({}, {"augment": None}, "its data has augment = 'crop-flip', this run has None"),
    ],
)
def test_resume_rejects_another_run(tmp_path, config, loader, message):
    interrupt(1, tmp_path)
    model = make_model()
    with pytest.raises(ValueError, match=message):
        run(
            model,
            make_loader(**loader),
            TrainConfig(**CONFIG | config),
            checkpoint_dir=tmp_path,
            resume=True,
        )
    assert_same_state(model, make_model())


def test_resume_rejects_another_model(tmp_path):
    interrupt(1, tmp_path)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, 13), nn.ReLU(), nn.Linear(13, 3))
    with pytest.raises(ValueError, match=r"does not fit the model, 3 tensors differ.*1\.weight"):
        run(wide, checkpoint_dir=tmp_path, resume=True)
    frozen = make_model()
    frozen[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"has trained 1\.bias, which is frozen"):
        run(frozen, checkpoint_dir=tmp_path, resume=True)
    network = ConvNet("aol", None, width=4, input_size=(1, 4, 4), n_classes=3)
    with pytest.raises(ValueError, match="is of another run: its model has"):
        run(network, checkpoint_dir=tmp_path, resume=True)


def test_resume_rejects_a_truncated_checkpoint(tmp_path):
    interrupt(1, tmp_path)
    path = tmp_path / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is truncated"):
        run(checkpoint_dir=tmp_path, resume=True)


def test_a_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    interrupt(1, tmp_path)
    before = (tmp_path / "last.safetensors").read_bytes()

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        run(checkpoint_dir=tmp_path, resume=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]
    assert (tmp_path / "last.safetensors").read_bytes() == before


class Poison(nn.Module):
    """Makes the scores of one training step NaN or Inf."""

    def __init__(self, at, value):
        super().__init__()
        self.at, self.value, self.count = at, value, 0

    def forward(self, x):
        self.count += 1
        return x * self.value if self.count == self.at else x


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_named_and_keeps_the_last_good_checkpoint(tmp_path, value):
    # Three steps per epoch: the fifth is the second of epoch 2.
    model = nn.Sequential(make_model(), Poison(5, value))
    with pytest.raises(TrainingDiverged) as caught:
        run(model, checkpoint_dir=tmp_path)
    rate = one_cycle(4, 9, 0.1)
    assert (caught.value.epoch, caught.value.step, caught.value.lr) == (2, 2, rate)
    for part in ("the loss is nan", "epoch 2, step 2", f"{rate:.4g}", "last good epoch, 1"):
        assert part in str(caught.value)
    kept = load_checkpoint(tmp_path / "last.safetensors")
    assert kept.metadata["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in kept.model.values())


def test_divergence_in_the_first_epoch_writes_nothing(tmp_path):
    model = nn.Sequential(make_model(), Poison(1, math.nan))
    with pytest.raises(TrainingDiverged, match=r"epoch 1, step 1, .*; lower the learning rate$"):
        run(model, checkpoint_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_broken_by_the_last_update_are_found(tmp_path):
    model = make_model()
    count = 0

    def poison(grad):
        nonlocal count
        count += 1
        return grad * math.nan if count == 6 else grad

    model[3].bias.register_hook(poison)
    with pytest.raises(TrainingDiverged, match="a weight is NaN or Inf in epoch 2, step 3"):
        run(model, checkpoint_dir=tmp_path)
    assert load_checkpoint(tmp_path / "last.safetensors").metadata["epoch"] == 1


def test_autocast_runs_the_network_in_bfloat16():
    seen = []
    model = make_model()
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    _, result = run(model, config=TrainConfig(**CONFIG, autocast=True))
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _, plain = run()
    assert result.losses != plain.losses
    # bfloat16 keeps 8 bits; the loss is the mean of well-conditioned terms of order 1.
    assert result.losses == pytest.approx(plain.losses, rel=2**-6)


def test_frozen_parameters_stay(tmp_path):
    model = make_model()
    model[1].weight.requires_grad_(False)
    before = model[1].weight.clone()
    run(model, checkpoint_dir=tmp_path)
    assert torch.equal(model[1].weight, before)
    assert "1.weight" not in load_checkpoint(tmp_path / "last.safetensors").momentum


def test_callback_may_put_the_model_into_eval_mode():
    model = make_model()
    model.append(nn.Dropout(0.0))
    modes = []
    model[-1].register_forward_hook(lambda module, *_: modes.append(module.training))
    run(model, on_epoch=lambda epoch, loss: model.eval())
    assert all(modes)


def test_progress_bar_shows_epoch_and_loss(capsys):
    train(make_model(), make_loader(), TrainConfig(**CONFIG), progress=True)
    out = capsys.readouterr().out
    assert "epoch 3/3" in out
    assert "loss" in out
    run()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("config", "loader", "message"),
    [
        ({}, {"rank": 1, "world_size": 2}, "loader must have rank 0 of world_size 1"),
        ({}, {"train": False, "augment": None}, "must be a training loader"),
        ({"batch_size": 8}, {}, "loader.batch_size must be config.batch_size, 8, got 16"),
        ({}, {"seed": 2}, "loader.seed must be config.seed, 0, got 2"),
        ({}, {"world_size": 2}, "loader must have rank 0 of world_size 1, .*got rank 0 of 2"),
        ({"device": "meta"}, {}, "loader.device must be config.device, meta, got cpu"),
    ],
)
def test_rejects(config, loader, message):
    with pytest.raises(ValueError, match=message):
        run(loader=make_loader(**loader), config=TrainConfig(**CONFIG | config))


def test_loss_of_an_epoch_is_the_mean_over_samples():
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    config = TrainConfig(**CONFIG | {"epochs": 1, "lr": 1e-12})
    _, result = run(model, config=config)
    zero = torch.zeros(N, 3, dtype=torch.float64)
    shifted = zero - config.offset * F.one_hot(make_dataset().labels, 3)
    expected = 0.25 * F.cross_entropy(shifted / 0.25, make_dataset().labels)
    assert result.losses[0] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_losses_of_the_cpu():
    config = TrainConfig(**CONFIG, device="cuda")
    _, expected = run()
    _, result = run(loader=make_loader(device="cuda"), config=config)
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    assert result.peak_memory_bytes > 0
