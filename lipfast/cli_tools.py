"""Commands that measure layers and choose among them: advise, scaling, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lipfast.cli_options import DeviceOption, MethodsOption, method_names
from lipfast.console import console, user_errors


def advise(
    memory: Annotated[str | None, typer.Option(help="Of the device, such as 8GB.")] = None,
    train_hours: Annotated[float | None, typer.Option(help="Of the whole training run.")] = None,
    inference_ms: Annotated[float | None, typer.Option(help="Milliseconds per image.")] = None,
    side: Annotated[
        int, typer.Option("--map", help="Height and width of the images, a power of two.")
    ] = 32,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    images: Annotated[int, typer.Option(help="Of the training set.")] = 50_000,
    batch_size: Annotated[int, typer.Option(help="Of training.")] = 256,
    min_epochs: Annotated[int, typer.Option(help="Fewest epochs that count as training.")] = 100,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time each candidate here (takes minutes).")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Recommend a method and a network size for a budget, and say what that rests on."""
    from lipfast.report import advise as module
    from lipfast.report.advice_table import advice_lines, advice_table
    from lipfast.report.experiment import available_device

    screen = console()
    with user_errors():
        budget = module.Budget(
            memory_bytes=None if memory is None else module.parse_bytes(memory),
            train_seconds=None if train_hours is None else 3600 * train_hours,
            inference_seconds=None if inference_ms is None else inference_ms / 1e3,
            side=side,
            classes=classes,
            images=images,
            batch_size=batch_size,
            min_epochs=min_epochs,
        )
        advice = module.advise(
            budget,
            device=available_device(device),
            measure=measure,
            log=lambda line: screen.print(line, soft_wrap=True),
        )
    for line in advice_lines(advice, budget):
        screen.print(line, soft_wrap=True)
    screen.print()
    screen.print(advice_table(advice))
    screen.print()
    for line in advice.notes:
        screen.print(line, soft_wrap=True)
    if not advice.fitting:
        raise typer.Exit(1)


def scaling(
    out: Annotated[Path, typer.Option(help="Folder of the table and the plot.")],
    methods: MethodsOption = "all",
    batch: Annotated[int, typer.Option(min=1, help="Maps per step.")] = 16,
    seconds: Annotated[
        float, typer.Option(help="Longest training step to measure; beyond it, computed.")
    ] = 1.0,
    device: DeviceOption = None,
) -> None:
    """Measure how time and memory of each layer grow with channels and with maps."""
    from lipfast.report.experiment import available_device
    from lipfast.report.scaling import PLAIN, measure_scaling
    from lipfast.report.scaling_report import write_scaling

    screen = console()
    with user_errors():
        found = measure_scaling(
            [*method_names(methods), PLAIN],
            batch=batch,
            seconds_per_step=seconds,
            device=available_device(device),
            log=lambda line: screen.print(line, soft_wrap=True),
        )
        files = write_scaling(found, out)
    for file in files:
        screen.print(str(file), soft_wrap=True)


def report(
    results: Annotated[Path, typer.Argument(help="JSON that pytest-benchmark wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the table and the plot. [default: the JSON's]")
    ] = None,
) -> None:
    """Render the benchmarks of `pytest bench --benchmark-only --benchmark-json FILE`."""
    from lipfast.report.bench import BenchReport, rivals, write_bench

    screen = console()
    with user_errors():
        found = BenchReport.load(results)
        files = write_bench(found, results.parent if out is None else out)
    for file in files:
        screen.print(str(file), soft_wrap=True)
    screen.print(f"{len(found.rows)} benchmarks; another variant is faster in {len(found.slower)}:")
    for row in found.slower:
        faster = ", ".join(f"{n} {r:.2f}x" for n, r in rivals(row).items() if r < 1)
        screen.print(f"  {row.name}: {faster}", soft_wrap=True)
