"""The training loop: its arithmetic, its result, its modes, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import CONFIG, N, assert_same_state, make_dataset, make_loader, make_model, run

from lipfast.data import channel_mean
from lipfast.training import TrainConfig, load_checkpoint, margin_cross_entropy, one_cycle, train


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
