import math

import pytest

from lipfast.training import TrainConfig

GOOD = {"epochs": 3, "lr": 0.1, "weight_decay": 1e-5}


def test_defaults():
    config = TrainConfig(**GOOD)
    assert (config.batch_size, config.momentum, config.seed) == (256, 0.9, 0)
    assert config.offset == pytest.approx(0.3993, abs=5e-5)
    assert config.temperature == 0.25
    assert config.autocast is False
    assert config.device == "cpu"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be an int, got 1.5"),
        ({"epochs": True}, TypeError, "epochs must be an int, got True"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"lr": 0.0}, ValueError, "lr must be positive, got 0.0"),
        ({"lr": -0.1}, ValueError, "lr must be positive, got -0.1"),
        ({"lr": math.nan}, ValueError, "lr must be finite, got nan"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"weight_decay": -1e-9}, ValueError, "weight_decay must be at least 0"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": -0.1}, ValueError, "momentum must be at least 0 and below 1, got -0.1"),
        ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ({"offset": math.inf}, ValueError, "offset must be finite, got inf"),
        ({"autocast": 1}, TypeError, "autocast must be a bool, got 1"),
        ({"device": "gpu0"}, ValueError, "device must be a torch device.*'gpu0'"),
        ({"device": None}, TypeError, "device must be a string, got None"),
    ],
)
def test_rejects(change, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**GOOD | change)
