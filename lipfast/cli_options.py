"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    str, typer.Option("--data", help="digits, cifar10, cifar100 or tiny-imagenet.")
]
RootOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the data set. [default: $LIPFAST_DATA, else ./data]"),
]
SizeOption = Annotated[
    str | None, typer.Option(help="Network size XS, S, M or L. [default: the recipe's]")
]
EpochsOption = Annotated[int | None, typer.Option(help="[default: the recipe's]")]
SeedOption = Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one]")
]
MethodsOption = Annotated[
    str, typer.Option("--methods", help="all, or names with commas: aol,soc.")
]


def method_names(text: str) -> list[str]:
    """The methods of a `MethodsOption`."""
    from lipfast.nn import METHODS

    return list(METHODS) if text == "all" else names(text)


def names(text: str) -> list[str]:
    """The names in a text with commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))
