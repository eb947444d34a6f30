"""What the commands print on, and how they fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

PLAIN_WIDTH = 120


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors that user input causes into one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise failure(str(error), code=2) from None


def failure(message: str, *, code: int) -> typer.Exit:
    """Print an error, and return the exception that ends the command with this exit code."""
    print_error(message)
    return typer.Exit(code)


def print_error(message: str) -> None:
    """Print an error as one line on the error output."""
    line = f"error: {' '.join(message.split())}"
    console(stderr=True).print(line, style="red", soft_wrap=True)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that neither highlights nor reads markup."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, width=width)
