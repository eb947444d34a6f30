import pytest
import torch

from lipfast.training import one_cycle


@pytest.mark.parametrize("total", [1, 2, 3, 4, 10, 11, 997])
def test_equals_torch(total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=total)
    for step in range(total):
        assert one_cycle(step, total, 0.3) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("step", [-1, 5])
def test_rejects(step):
    with pytest.raises(ValueError, match=rf"step must be in 0\.\.4, got {step}"):
        one_cycle(step, 5, 0.1)
