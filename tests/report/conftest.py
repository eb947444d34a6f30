"""A comparison of seven methods with plausible figures, without training anything."""

from collections.abc import Callable

import pytest

from lipfast.report import Comparison, MethodResult

RADII = (36 / 255, 72 / 255, 108 / 255, 1.0)
MIB = 2**20
# method: label, seconds per epoch, images per second, MiB in training and inference, accuracies.
FIGURES = {
    "aol": ("AOL", 0.290, 40000, 6.5, 2.25, 0.930, (0.878, 0.763, 0.620, 0.031)),
    "bcop": ("BCOP", 0.710, 39800, 9.5, 2.50, 0.952, (0.906, 0.812, 0.669, 0.042)),
    "cayley": ("Cayley", 0.550, 28100, 12.5, 3.75, 0.959, (0.916, 0.820, 0.680, 0.050)),
    "cpl": ("CPL", 0.270, 25300, 7.0, 2.75, 0.931, (0.854, 0.718, 0.523, 0.008)),
    "lot": ("LOT", 1.830, 22100, 58.0, 6.00, 0.952, (0.905, 0.815, 0.663, 0.039)),
    "sll": ("SLL", 0.320, 24700, 8.0, 2.75, 0.944, (0.895, 0.782, 0.644, 0.036)),
    "soc": ("SOC", 0.540, 6250, 21.5, 3.00, 0.939, (0.880, 0.766, 0.609, 0.028)),
}


@pytest.fixture
def make_comparison() -> Callable[..., Comparison]:
    def make(methods: tuple[str, ...] = tuple(FIGURES), failed: tuple[str, ...] = ()) -> Comparison:
        results = []
        for method in methods:
            label, epoch, speed, train, inference, accuracy, certified = FIGURES[method]
            if method in failed:
                error = "loss: expected a finite value,\ngot nan in epoch 3"
                results.append(MethodResult(method, label, error=error))
                continue
            results.append(
                MethodResult(
                    method,
                    label,
                    n_parameters=49578,
                    epochs=40,
                    train_seconds=40 * epoch,
                    train_seconds_per_epoch=epoch,
                    train_step_seconds=epoch / 12,
                    inference_images_per_second=speed,
                    train_memory_bytes=int(train * MIB),
                    inference_memory_bytes=int(inference * MIB),
                    accuracy=accuracy,
                    certified=dict(zip(RADII, certified, strict=True)),
                    lipschitz_bound=1 + 3e-7,
                    layer_bound_max=1 + 2e-8,
                )
            )
        return Comparison(
            results=tuple(results),
            dataset="digits",
            device="cpu",
            machine="a machine with <two> cores & more",
            versions={"lipfast": "0.1.0", "torch": "2.13.0"},
            date="2025-03-01T12:00:00+00:00",
            config={
                "seed": 0,
                "network": {"input_size": [1, 8, 8], "width": 16},
                "recipes": {method: {"lr": 0.1, "epochs": 40} for method in methods},
            },
        )

    return make
