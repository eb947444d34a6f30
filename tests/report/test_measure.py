import time

import torch
from torch import Tensor, nn

from lipfast.report.measure import (
    LiveBytes,
    inference_memory_bytes,
    inference_seconds,
    training_memory_bytes,
    training_step_seconds,
)

FLOAT = 4


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


def parameter_bytes(model: nn.Module) -> int:
    return FLOAT * sum(p.numel() for p in model.parameters())


def test_inference_memory_is_parameters_and_the_largest_pair_of_activations() -> None:
    model, x = network(), torch.randn(128, 1, 8, 8)
    activation = FLOAT * 128 * 16 * 64
    assert inference_memory_bytes(model, x) == parameter_bytes(model) + 2 * activation


def test_inference_memory_counts_what_a_module_caches() -> None:
    class Cached(nn.Module):
        cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.zeros(1000, 1000)
            return x

        def train(self, mode: bool = True) -> "Cached":
            self.cache = None
            return super().train(mode)

    model = Cached()
    model.eval()
    model(torch.zeros(1))
    assert inference_memory_bytes(model, torch.zeros(1)) == FLOAT * 1000 * 1000


def test_training_memory_counts_state_and_saved_activations() -> None:
    model, x, y = network(), torch.randn(128, 1, 8, 8), torch.zeros(128, dtype=torch.long)
    activation = FLOAT * 128 * 16 * 64
    # Parameters, gradients, momentum; the output of both convolutions or of ReLU and convolution,
    # and one gradient of that size.
    state = 3 * parameter_bytes(model)
    measured = training_memory_bytes(model, x, y)
    assert state + 2 * activation <= measured <= state + 4 * activation


def test_live_bytes_follow_creation_views_and_release() -> None:
    x = torch.zeros(1000)
    with LiveBytes() as live:
        y = x + 1
        assert live.current == 4000
        z = y.view(10, 100)
        z += 1
        assert live.current == 4000
        del y
        assert live.current == 4000
        del z
        assert live.current == 0
        assert x.reshape(10, 100).sum() == 0
    assert live.peak == 4000


def test_inference_time_is_the_median_of_calls() -> None:
    class Sleep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            time.sleep(0.02)
            return x

    seconds = inference_seconds(Sleep(), torch.zeros(1))
    assert 0.02 <= seconds < 0.2


def test_training_step_updates_the_weights() -> None:
    model, x, y = network(), torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
    before = [p.detach().clone() for p in model.parameters()]
    assert training_step_seconds(model, x, y) > 0
    after = model.parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
