"""The progress bar of a training run."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar over all steps that shows the mean loss of the last whole epoch.

    It counts steps on the host, so that it never waits for the device.

    Args:
        steps: steps per epoch.
        epochs: epochs in all.
        done: epochs that an earlier run has done.
    """

    def __init__(self, steps: int, epochs: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[label]}"),
            BarColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        self._steps, self._epochs, self._done = steps, epochs, done * steps
        self._task = self._progress.add_task(
            "train", total=steps * epochs, completed=self._done, label="", loss=""
        )

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Count one step."""
        label = f"epoch {self._done // self._steps + 1}/{self._epochs}"
        self._done += 1
        self._progress.update(self._task, advance=1, label=label)

    def show_loss(self, loss: float) -> None:
        """Show the mean loss of the epoch that has just ended."""
        self._progress.update(self._task, loss=f"loss {loss:.4f}")
