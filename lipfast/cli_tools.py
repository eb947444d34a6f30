"""Commands that measure layers and choose among them: scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lipfast.console import console, user_errors

DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one]")
]


def scaling(
    out: Annotated[Path, typer.Option(help="Folder of the table and the plot.")],
    methods: Annotated[str, typer.Option(help="all, or names with commas: aol,soc.")] = "all",
    batch: Annotated[int, typer.Option(min=1, help="Maps per step.")] = 16,
    seconds: Annotated[
        float, typer.Option(help="Longest training step to measure; beyond it, computed.")
    ] = 1.0,
    device: DeviceOption = None,
) -> None:
    """Measure how time and memory of each layer grow with channels and with maps."""
    from lipfast.nn import METHODS
    from lipfast.report.experiment import available_device
    from lipfast.report.scaling import PLAIN, measure_scaling
    from lipfast.report.scaling_report import write_scaling

    screen = console()
    names = list(METHODS) if methods == "all" else [m.strip() for m in methods.split(",")]
    with user_errors():
        found = measure_scaling(
            [*names, PLAIN],
            batch=batch,
            seconds_per_step=seconds,
            device=available_device(device),
            log=lambda line: screen.print(line, soft_wrap=True),
        )
        files = write_scaling(found, out)
    for file in files:
        screen.print(str(file), soft_wrap=True)
