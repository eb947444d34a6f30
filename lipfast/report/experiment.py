"""One method on one data set, ready to be trained and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipfast.data import Dataset, DeviceLoader, channel_mean
from lipfast.models import ConvNet
from lipfast.training import Recipe, TrainConfig, recipe


def adapted_recipe(dataset: str, method: str, *, size: str | None = None, **changes: Any) -> Recipe:
    """Return the recipe of a method with another network size or other hyperparameters.

    A change of None keeps what the recipe has; `size` takes the place of its width. Raises
    ValueError for an unknown data set or method.
    """
    adapted = recipe(dataset, method)
    for name, value in changes.items():
        if name not in adapted:
            raise ValueError(f"{name}: expected one of {', '.join(adapted)}")
        if value is not None:
            adapted[name] = value  # type: ignore[literal-required]
    if size is not None:
        adapted["model"] = {**adapted["model"], "size": size, "width": None}
    return adapted


def available_device(name: str | None) -> str:
    """Return a device by name, or the best one for None.

    Raises ValueError when there is no such device here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f'device: expected "cpu", "cuda" or "cuda:N", got {name!r}')
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch can use, got {name!r} without a GPU")
    count = torch.cuda.device_count()
    if kind == "cuda" and (torch.device(name).index or 0) >= count:
        raise ValueError(f"device: expected one of {count} CUDA devices, got {name!r}")
    return name


@dataclass(frozen=True)
class Experiment:
    """What it takes to build, train and test the network of one method."""

    method: str
    recipe: Recipe
    train_set: Dataset
    test_set: Dataset
    seed: int
    device: str
    autocast: bool = False
    rank: int = 0
    world_size: int = 1

    def model(self) -> ConvNet:
        """Build the network on the device; the same seed gives the same weights.

        Raises ValueError for arguments that `ConvNet` refuses.
        """
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return ConvNet(self.method, **self.recipe["model"]).to(self.device)

    def config(self) -> TrainConfig:
        """Return the hyperparameters; ValueError and TypeError as from `TrainConfig`."""
        return TrainConfig(
            epochs=self.recipe["epochs"],
            lr=self.recipe["lr"],
            weight_decay=self.recipe["weight_decay"],
            batch_size=self.recipe["batch_size"],
            seed=self.seed,
            autocast=self.autocast,
            device=self.device,
        )

    def train_loader(self) -> DeviceLoader:
        """Return the loader of augmented training batches of this process."""
        return DeviceLoader(
            self.train_set,
            self.recipe["batch_size"],
            mean=self._mean(),
            train=True,
            augment=self.recipe["augment"],
            seed=self.seed,
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
        )

    def test_loader(self) -> DeviceLoader:
        """Return the loader of test batches."""
        return DeviceLoader(
            self.test_set,
            self.recipe["batch_size"],
            mean=self._mean(),
            train=False,
            augment=None,
            device=self.device,
        )

    def _mean(self) -> Tensor:
        return channel_mean(self.train_set)
