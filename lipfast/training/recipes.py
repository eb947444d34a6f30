"""Default hyperparameters for every data set and method."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

from lipfast.data import NAMES
from lipfast.nn import METHODS


class Recipe(TypedDict):
    """Defaults of one run: four fields of `TrainConfig`, the loader's `augment`, and the arguments
    of `ConvNet` beside the method."""

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int
    augment: str | None
    model: dict[str, Any]


class _Tuned(NamedTuple):
    epochs: int
    lr: float
    weight_decay: float


# Tuned on the digits for the network of three blocks below.
_DIGITS = {
    "aol": _Tuned(100, 0.18, 1e-5),
    "bcop": _Tuned(50, 0.07, 1e-5),
    "cayley": _Tuned(50, 0.1, 1e-5),
    "cpl": _Tuned(120, 0.3, 1e-5),
    "lot": _Tuned(40, 0.24, 1e-5),
    "sll": _Tuned(60, 0.9, 1e-5),
    "soc": _Tuned(60, 0.2, 1e-5),
}

# The paper searches learning rate and weight decay at random, in 10^[-4, -1] and 10^[-5.5, -3.5].
# These are what its authors found for size XS on CIFAR-10, as their published run settings record,
# rounded; the epochs are those of its two-hour budget on an A100 at that size.
_PAPER = {
    "aol": _Tuned(837, 0.057, 3.7e-5),
    "bcop": _Tuned(127, 0.0065, 2.6e-4),
    "cayley": _Tuned(356, 0.017, 2.4e-5),
    "cpl": _Tuned(836, 0.034, 1.3e-4),
    "lot": _Tuned(222, 0.083, 4.1e-6),
    "sll": _Tuned(735, 0.091, 2.0e-5),
    "soc": _Tuned(371, 0.051, 7.2e-6),
}

_NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {
        "size": None,
        "width": 16,
        "layers_per_block": 2,
        "input_size": (1, 8, 8),
        "n_classes": 10,
    },
    "cifar10": {"size": "XS", "input_size": (3, 32, 32), "n_classes": 10},
    "cifar100": {"size": "XS", "input_size": (3, 32, 32), "n_classes": 100},
    "tiny-imagenet": {"size": "XS", "input_size": (3, 64, 64), "n_classes": 200},
}


def recipe(dataset: str, method: str) -> Recipe:
    """Default hyperparameters for a data set of `lipfast.data.NAMES` and a method of `METHODS`.

    The digits have tuned ones. CIFAR-10, CIFAR-100 and Tiny ImageNet have the paper's protocol
    (batch 256, its augmentation, size XS) with learning rate, weight decay and epochs of its
    CIFAR-10 runs; Tiny ImageNet, with twice the images, has half the epochs. For another size or
    set they are a starting point, not tuned values.

    Source: Prach et al., "1-Lipschitz Layers Compared", CVPR 2024, and the authors' run settings.

    Raises:
        ValueError: unknown data set or method.
    """
    if dataset not in NAMES:
        raise ValueError(f"dataset must be one of {', '.join(NAMES)}, got {dataset!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if dataset == "digits":
        tuned, batch_size, augment = _DIGITS[method], 128, None
    elif dataset == "tiny-imagenet":
        tuned, batch_size, augment = _PAPER[method], 256, "randaugment"
        tuned = tuned._replace(epochs=round(tuned.epochs / 2))
    else:
        tuned, batch_size, augment = _PAPER[method], 256, "crop-flip"
    return Recipe(
        epochs=tuned.epochs,
        lr=tuned.lr,
        weight_decay=tuned.weight_decay,
        batch_size=batch_size,
        augment=augment,
        model=dict(_NETWORKS[dataset]),
    )
