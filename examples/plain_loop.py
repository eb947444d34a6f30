"""Swap lipfast into a plain training loop: two networks, one line each.

`accelerate` is for a network that is 1-Lipschitz already, of published layers: same function, same
parameters, faster. `convert` is for one of plain convolutions.
"""

import argparse
import time

import torch
from common import batches, digits, show
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import lipfast
from lipfast.nn import FirstChannels, MaxMin
from lipfast.training import margin_cross_entropy


class AOLConv2DRescaling(nn.Module):
    """As the code of the paper has it."""

    def forward(self, weight: Tensor) -> Tensor:
        swapped, pad = weight.transpose(0, 1), weight.shape[-1] - 1
        rows = nn.functional.conv2d(swapped, swapped, padding=pad).abs().sum((1, 2, 3))
        return weight / (rows[:, None, None] + 1e-6).sqrt()


class AOLConv2d(nn.Conv2d):
    """A layer of your own code, under its published name."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding="same", padding_mode="circular"
        )
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)
        register_parametrization(self, "weight", AOLConv2DRescaling())


def published() -> nn.Module:
    convs = [m for _ in range(3) for m in (AOLConv2d(16, 16, 3), MaxMin())]
    return nn.Sequential(
        *(nn.PixelUnshuffle(4), *convs, nn.PixelUnshuffle(2)),  # 16 x 2 x 2, then 64 x 1 x 1
        *(AOLConv2d(64, 64, 1), nn.Flatten(), FirstChannels(10)),
    )


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.PixelUnshuffle(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.PixelUnshuffle(2)),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    start = time.perf_counter()
    for _ in range(epochs):
        for x, y in batches(images, labels):
            optimizer.zero_grad()
            margin_cross_entropy(model(x), y).backward()
            optimizer.step()
    print(f"{epochs} epochs in {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    train_set, test_set = digits()

    model = published()
    lipfast.accelerate(model)  # the line that is new
    train(model, *train_set, epochs)
    show("accelerate", model, *test_set)

    model = plain()
    lipfast.convert(model, "aol", activation="maxmin")  # the line that is new
    train(model, *train_set, epochs)
    show("convert", model, *test_set)


if __name__ == "__main__":
    main()
