"""Runs that were interrupted, diverged or could not write: what is kept, and how they go on."""

import math
import os

import pytest
import torch
from torch import nn
from training_cases import CONFIG, N, assert_same_state, make_loader, make_model, run

from lipfast.models import ConvNet
from lipfast.training import TrainConfig, TrainingDiverged, load_checkpoint, load_model, one_cycle


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
