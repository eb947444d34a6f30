"""The `lipfast` command: info, train, certify, search, compare, advise, scaling, report."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lipfast import cli_compare, cli_tools
from lipfast.cli_options import (
    DataOption,
    DeviceOption,
    EpochsOption,
    RootOption,
    SeedOption,
    SizeOption,
)
from lipfast.console import console as _console
from lipfast.console import failure, user_errors

if TYPE_CHECKING:
    from lipfast.report.experiment import Experiment

app = typer.Typer(
    help="Train, certify and compare 1-Lipschitz networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line of this process."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        import lipfast

        _console().print(f"lipfast {lipfast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    pass


@app.command()
def info() -> None:
    """Show what was built, which backends can run here, and why the others cannot."""
    import lipfast.ops  # noqa: F401  (its import registers the ops)
    from lipfast import backends
    from lipfast.report.info import info_tables

    console = _console()
    for title, table in info_tables(backends.info()).items():
        console.print(title, style="bold")
        console.print(table)
        console.print()


@app.command()
def train(
    method: Annotated[str, typer.Option(help="aol, bcop, cayley, cpl, lot, sll or soc.")],
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    data_root: RootOption = None,
    size: SizeOption = None,
    epochs: EpochsOption = None,
    lr: Annotated[float | None, typer.Option(help="[default: the recipe's]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="[default: the recipe's]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Over all processes. [default: the recipe's]")
    ] = None,
    seed: SeedOption = 0,
    autocast: Annotated[bool, typer.Option("--autocast", help="bfloat16 convolutions.")] = False,
    device: DeviceOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint.")] = False,
    shard_weights: Annotated[
        bool,
        typer.Option(
            "--shard-weights", help="Under torchrun, build each layer's weights in one process."
        ),
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds to wait for another process. [default: torch's]"),
    ] = None,
) -> None:
    """Train one network, by default with the recipe of its data set and method.

    Runs under torchrun too: the batch is then shared by the processes.
    """
    from lipfast.data import load
    from lipfast.report.experiment import Experiment, adapted_recipe, available_device
    from lipfast.training import (
        CHECKPOINT_NAME,
        ProcessLost,
        TrainingDiverged,
        distributed_from_env,
    )
    from lipfast.training import train as run

    with user_errors():
        recipe = adapted_recipe(
            data,
            method,
            size=size,
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            batch_size=batch_size,
        )
        device = available_device(device)
        sets = load(data, data_root)
    with distributed_from_env(device, timeout=timeout) as world:
        with user_errors():
            experiment = Experiment(
                method,
                recipe,
                *sets,
                seed,
                world.device,
                autocast,
                rank=world.rank,
                world_size=world.world_size,
            )
            config, model, loader = (
                experiment.config(),
                experiment.model(),
                experiment.train_loader(),
            )
            if world.rank == 0:
                out.mkdir(parents=True, exist_ok=True)
        console = _console(quiet=world.rank != 0)
        console.print(_headline(experiment))
        bar = console.is_terminal

        def show(epoch: int, loss: float) -> None:
            console.print(f"epoch {epoch}/{config.epochs}: loss {loss:.4f}")

        try:
            with user_errors() if resume else nullcontext():
                result = run(
                    model,
                    loader,
                    config,
                    checkpoint_dir=out,
                    resume=resume,
                    progress=bar,
                    on_epoch=None if bar else show,
                    shard_weights=shard_weights,
                )
        except (TrainingDiverged, ProcessLost) as error:
            raise failure(str(error), code=1) from None
        console.print(
            f"{result.epochs} epochs in {result.seconds:.1f} s, "
            f"{result.seconds_per_epoch:.3g} s per epoch, loss {result.losses[-1]:.4f}"
        )
        console.print(f"checkpoint: {out / CHECKPOINT_NAME}", soft_wrap=True)


@app.command()
def certify(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that lipfast train wrote.")],
    data: DataOption,
    data_root: RootOption = None,
    radius: Annotated[
        list[str] | None,
        typer.Option(
            help="l2 radius, pixels in [0, 1], such as 36/255; may be repeated. "
            "[default: 36/255, 72/255, 108/255, 1]"
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    device: DeviceOption = None,
) -> None:
    """Test and certify a trained network: accuracies and proved Lipschitz bounds."""
    from lipfast.certify import RADII, report
    from lipfast.report.certification import (
        certification_json,
        certification_lines,
        checkpoint_loader,
    )
    from lipfast.report.experiment import available_device
    from lipfast.report.radii import parse_radius
    from lipfast.training import load_model

    with user_errors():
        radii = [parse_radius(text) for text in radius] if radius else list(RADII)
        device = available_device(device)
        model, metadata = load_model(checkpoint)
        loader = checkpoint_loader(model, metadata, data, data_root, device)
        found = report(model.to(device), loader, radii=radii)
    console = _console()
    for line in certification_lines(found):
        console.print(line, soft_wrap=True)
    if json is not None:
        with user_errors():
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(certification_json(found, str(checkpoint), data), encoding="utf-8")


app.command()(cli_compare.compare)
app.command()(cli_compare.search)
app.command()(cli_tools.advise)
app.command()(cli_tools.scaling)
app.command()(cli_tools.report)


def _headline(experiment: Experiment) -> str:
    recipe = experiment.recipe
    return (
        f"{experiment.method} on {experiment.train_set.name}, {experiment.device}: "
        f"{recipe['epochs']} epochs, batch size {recipe['batch_size']}, "
        f"learning rate {recipe['lr']:g}, weight decay {recipe['weight_decay']:g}"
    )
