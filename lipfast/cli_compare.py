"""The commands that train several networks: compare, and search before it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lipfast.cli_options import (
    DataOption,
    DeviceOption,
    EpochsOption,
    MethodsOption,
    RootOption,
    SeedOption,
    SizeOption,
    method_names,
    names,
)
from lipfast.console import console, print_error, user_errors

if TYPE_CHECKING:
    from rich.console import Console

    from lipfast.report.compare import ComparisonPlan
    from lipfast.report.results import Comparison

HoursOption = Annotated[
    float | None, typer.Option(help="Of each training, in place of epochs; measured first.")
]


def compare(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the report and the checkpoints.")],
    methods: MethodsOption = "all",
    data_root: RootOption = None,
    size: SizeOption = None,
    sizes: Annotated[
        str | None, typer.Option(help="Several with commas: XS,S. One folder each.")
    ] = None,
    epochs: EpochsOption = None,
    hours: HoursOption = None,
    tuned: Annotated[
        Path | None, typer.Option(help="Folder of a search: take its best hyperparameters.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what finished in the folder.")
    ] = False,
) -> None:
    """Train, certify and measure several methods; write tables, plots and an HTML page.

    With --sizes also the table of all sizes, in the layout of the paper's.
    """
    from lipfast.models import SIZES
    from lipfast.report.compare import plan_comparison
    from lipfast.report.experiment import available_device
    from lipfast.report.sizes import write_sizes

    screen = console()
    with user_errors():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("compare runs in one process; under torchrun use search or train")
        if sizes is not None and size is not None:
            raise ValueError("sizes: expected either --size or --sizes, got both")
        several = None if sizes is None else names(sizes)
        unknown = [name for name in several or () if name not in SIZES]
        if unknown:
            raise ValueError(f"sizes: expected some of {', '.join(SIZES)}, got {unknown[0]!r}")
        folders = {size: out} if several is None else {name: out / name for name in several}
        plans = {
            name: plan_comparison(
                data,
                method_names(methods),
                folder,
                data_root=data_root,
                size=name,
                epochs=epochs,
                seed=seed,
                device=available_device(device),
                resume=resume,
                hours=hours,
                tuned=tuned,
            )
            for name, folder in folders.items()
        }
    found = {}
    for name, plan in plans.items():
        if several is not None:
            screen.print(f"size {name}")
        found[name] = _run(plan, screen)
    if several is not None:
        for file in write_sizes({str(n): c for n, c in found.items()}, out):
            screen.print(str(file), soft_wrap=True)
    if any(comparison.failures for comparison in found.values()):
        raise typer.Exit(1)


def _run(plan: ComparisonPlan, screen: Console) -> Comparison:
    from lipfast.report.metrics import bound_text
    from lipfast.report.tables import failure_lines, terminal_table

    comparison, files = plan.run(
        progress=screen.is_terminal,
        log=lambda line: screen.print(line, soft_wrap=True),
    )
    screen.print()
    screen.print(terminal_table(comparison))
    screen.print()
    if comparison.finished:
        worst = max(comparison.finished, key=lambda r: r.layer_bound_max or 0.0)
        screen.print(f"largest layer bound: {bound_text(worst.layer_bound_max)} ({worst.label})")
    for file in files:
        screen.print(str(file), soft_wrap=True)
    for line in failure_lines(comparison):
        print_error(line)
    return comparison


def search(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the results, shared by all processes.")],
    methods: MethodsOption = "all",
    sizes: Annotated[str, typer.Option(help="With commas: XS,S.")] = "XS",
    runs: Annotated[int, typer.Option(help="Trainings for each method and size.")] = 16,
    hours: HoursOption = None,
    epochs: EpochsOption = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the training images that chooses.")
    ] = 0.1,
    job: Annotated[
        str | None,
        typer.Option(help="i/n: this is process i of 0..n-1. [default: torchrun's, else 0/1]"),
    ] = None,
    seed: SeedOption = 0,
    data_root: RootOption = None,
    device: DeviceOption = None,
) -> None:
    """Search learning rate and weight decay at random, in the paper's ranges.

    Several processes may share the folder: those of torchrun, each with its own GPU, or those of a
    job array with --job. What was interrupted goes on where it stopped.
    """
    from lipfast.report.experiment import available_device
    from lipfast.report.search import Search, best_trials

    screen = console()
    with user_errors():
        index, count = _job(job)
        found = available_device(device)
        if job is None and found == "cuda" and "LOCAL_RANK" in os.environ:
            found = available_device(f"cuda:{os.environ['LOCAL_RANK']}")
        plan = Search(
            data, tuple(method_names(methods)), tuple(names(sizes)), out,
            runs, hours, epochs, held_out, seed, data_root, found,
        )  # fmt: skip
        trials = plan.run((index, count), log=lambda line: screen.print(line, soft_wrap=True))
    screen.print(f"{len(trials)} of {runs * len(plan.methods) * len(plan.sizes)} runs finished")
    for (method, size), best in best_trials(trials).items():
        screen.print(
            f"{method} {size}: lr {best.lr:.4g}, weight decay {best.weight_decay:.4g}, "
            f"certified at 36/255 {100 * (best.certified or 0):.1f} % of the held-out images",
            soft_wrap=True,
        )


def _job(text: str | None) -> tuple[int, int]:
    if text is None:
        text = f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}"
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"job: expected i/n, such as 0/4, got {text!r}")
    return int(parts[0]), int(parts[1])
