"""Random search of learning rate and weight decay, one file per run, shared by many processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lipfast import certify
from lipfast.data import Dataset, load
from lipfast.models import SIZES
from lipfast.nn import METHODS
from lipfast.report.budget import epochs_in
from lipfast.report.experiment import Experiment, adapted_recipe
from lipfast.report.metrics import HEADLINE_RADIUS
from lipfast.training import train

LOG_LR = (-4.0, -1.0)  # base-10 logarithms, as in the paper
LOG_WEIGHT_DECAY = (-5.5, -3.5)
_SETTINGS = "search.json"
_TRIALS = "trials"


@dataclass(frozen=True)
class Trial:
    """One run: its hyperparameters, and what it reached on the held-out images.

    `certified` is the certified robust accuracy at 36/255, `accuracy` the clean one, fractions in
    [0, 1]; both are None and `error` says why where the run failed.
    """

    method: str
    size: str
    run: int
    lr: float
    weight_decay: float
    epochs: int
    certified: float | None = None
    accuracy: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Search:
    """A random search as the paper's: `runs` trainings for each method and size.

    Args:
        dataset: a name of `lipfast.data.NAMES`.
        methods: keys of `lipfast.nn.METHODS`.
        sizes: of the network, XS to L.
        out: folder of the results; a search that was interrupted goes on there.
        runs: trainings for each method and size.
        hours: of each training; None to train `epochs` epochs.
        epochs: of each training, where `hours` is None; None for those of the recipes.
        held_out: share of the training images that chooses the hyperparameters.
        seed: of the draws, the weights, the order and the held-out images.
        data_root: folder of the data set; see `lipfast.data.load`.
        device: where to train.

    Raises:
        ValueError: an argument is out of range.
    """

    dataset: str
    methods: tuple[str, ...]
    sizes: tuple[str, ...]
    out: Path
    runs: int = 16
    hours: float | None = None
    epochs: int | None = None
    held_out: float = 0.1
    seed: int = 0
    data_root: Path | str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown or not self.methods:
            raise ValueError(
                f"methods: expected some of {', '.join(METHODS)}, "
                f"got {', '.join(unknown) or 'none'}"
            )
        wrong = [size for size in self.sizes if size not in SIZES]
        if wrong or not self.sizes:
            raise ValueError(
                f"sizes: expected some of {', '.join(SIZES)}, got {', '.join(wrong) or 'none'}"
            )
        if self.runs < 1:
            raise ValueError(f"runs: expected an integer >= 1, got {self.runs!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share between 0 and 1, got {self.held_out!r}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs: expected an integer >= 1, got {self.epochs!r}")
        if self.seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {self.seed!r}")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise ValueError(f"hours: expected a number > 0, got {self.hours!r}")
        if self.hours is not None and self.epochs is not None:
            raise ValueError("hours: expected None where epochs are given")

    def run(
        self, job: tuple[int, int] = (0, 1), *, log: Callable[[str], None] = print
    ) -> list[Trial]:
        """Train the runs of one of several jobs, skip those with a result, return all results.

        Args:
            job: (i, n) for the i-th of n processes, 0 <= i < n, that share the folder; run r of the
                list belongs to process r mod n.
            log: called with one line after each run.

        Raises:
            ValueError: job is out of range, or the folder holds a search with other settings.
            FileNotFoundError: the data set is not there.
        """
        index, count = job
        if not 0 <= index < count:
            raise ValueError(f"job: expected (i, n) with 0 <= i < n, got {job!r}")
        train_set, held_out = split(load(self.dataset, self.data_root)[0], self.held_out, self.seed)
        self._check_settings()
        for place, (method, size, run) in enumerate(self._all()):
            path = self._path(method, size, run)
            if place % count != index or path.exists():
                continue
            trial = self._train(method, size, run, train_set, held_out)
            _write(path, dataclasses.asdict(trial))
            log(f"{METHODS[method].label} {size} {run + 1}/{self.runs}: {_summary(trial)}")
        return self.results()

    def results(self) -> list[Trial]:
        """Return the runs that have a result, of all processes."""
        paths = (self._path(*key) for key in self._all())
        return [_trial(path) for path in paths if path.exists()]

    def _all(self) -> Iterator[tuple[str, str, int]]:
        for run in range(self.runs):
            for size in self.sizes:
                for method in self.methods:
                    yield method, size, run

    def _path(self, method: str, size: str, run: int) -> Path:
        return self.out / _TRIALS / f"{method}-{size}-{run:03d}.json"

    def _check_settings(self) -> None:
        """Write the settings of the search, or refuse a folder that has others."""
        settings = {
            "dataset": self.dataset, "hours": self.hours, "epochs": self.epochs,
            "held_out": self.held_out, "seed": self.seed,
        }  # fmt: skip
        found = _first(self.out / _SETTINGS, settings)
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.out} holds a search with {name} {found.get(name)}, asked for was "
                    f"{value}; choose another folder"
                )

    def _train(
        self, method: str, size: str, run: int, train_set: Dataset, held_out: Dataset
    ) -> Trial:
        lr, weight_decay = drawn(self.seed, method, size, run)
        recipe = adapted_recipe(
            self.dataset, method, size=size, epochs=self.epochs, lr=lr, weight_decay=weight_decay
        )
        experiment = Experiment(method, recipe, train_set, held_out, self.seed, self.device)
        trial = Trial(method, size, run, lr, weight_decay, recipe["epochs"])
        try:
            if self.hours is not None:
                epochs = self._epochs(experiment, size)
                experiment = replace(experiment, recipe={**recipe, "epochs": epochs})
                trial = replace(trial, epochs=epochs)
            model = experiment.model()
            train(model, experiment.train_loader(), experiment.config(), progress=False)
            found = certify.report(model, experiment.test_loader(), radii=[HEADLINE_RADIUS])
        except (RuntimeError, ArithmeticError) as error:  # divergence, out of memory
            return replace(trial, error=str(error) or type(error).__name__)
        certified = found.certified[HEADLINE_RADIUS]
        return replace(trial, certified=certified, accuracy=found.accuracy)

    def _epochs(self, experiment: Experiment, size: str) -> int:
        """What fits into the time: measured once, and the same for every process."""
        path = self.out / "epochs" / f"{experiment.method}-{size}.json"
        if not path.exists():
            assert self.hours is not None
            _first(path, {"epochs": epochs_in(experiment, self.hours)})
        return int(_read(path)["epochs"])


def best_trials(trials: Sequence[Trial]) -> dict[tuple[str, str], Trial]:
    """Return the run with the highest certified robust accuracy of each (method, size)."""
    best: dict[tuple[str, str], Trial] = {}
    for trial in trials:
        key = (trial.method, trial.size)
        rank = -1.0 if trial.certified is None else trial.certified
        if rank >= 0 and (key not in best or rank > (best[key].certified or 0.0)):
            best[key] = trial
    return best


def load_best(folder: Path | str, dataset: str) -> dict[tuple[str, str], Trial]:
    """Return the best runs of the search in a folder.

    Raises ValueError where the folder holds no finished run, or those of another data set.
    """
    folder = Path(folder)
    best = best_trials([_trial(path) for path in sorted((folder / _TRIALS).glob("*.json"))])
    if not best or not (folder / _SETTINGS).exists():
        raise ValueError(f"{folder}: expected the folder of a search with finished runs, got none")
    searched = _read(folder / _SETTINGS).get("dataset")
    if searched != dataset:
        raise ValueError(f"{folder}: expected a search on {dataset}, got one on {searched}")
    return best


def drawn(seed: int, method: str, size: str, run: int) -> tuple[float, float]:
    """Return learning rate and weight decay of a run: 10^U[-4, -1] and 10^U[-5.5, -3.5].

    They depend on the arguments alone. Source: Prach et al., CVPR 2024, section 4.
    """
    digest = hashlib.sha256(f"{seed} {method} {size} {run}".encode()).digest()
    shares = (int.from_bytes(digest[i : i + 8], "big") / 2.0**64 for i in (0, 8))
    lr, weight_decay = (
        10 ** (low + share * (high - low))
        for share, (low, high) in zip(shares, (LOG_LR, LOG_WEIGHT_DECAY), strict=True)
    )
    return lr, weight_decay


def split(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return the data set without a share of its images, drawn at random, and that share.

    Raises ValueError where one of them would be empty.
    """
    count = round(share * len(dataset))
    if not 0 < count < len(dataset):
        raise ValueError(f"held_out: {share} of {len(dataset)} images leaves one part empty")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    kept, held_out = order[count:].sort().values, order[:count].sort().values
    return tuple(  # type: ignore[return-value]
        replace(dataset, images=dataset.images[part], labels=dataset.labels[part])
        for part in (kept, held_out)
    )


def _summary(trial: Trial) -> str:
    head = f"lr {trial.lr:.2g}, weight decay {trial.weight_decay:.2g}, epochs {trial.epochs}: "
    if trial.certified is None or trial.accuracy is None:
        return head + f"failed: {' '.join(str(trial.error).split())}"
    accuracy, certified = 100 * trial.accuracy, 100 * trial.certified
    return head + f"accuracy {accuracy:.1f} %, certified at 36/255 {certified:.1f} %"


def _first(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return what the file holds, which is `content` where this process is the first to write."""
    if not path.exists():
        temporary = _written(path, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected what a search wrote, got {error}") from error


def _trial(path: Path) -> Trial:
    try:
        return Trial(**_read(path))
    except TypeError as error:
        raise ValueError(f"{path}: expected a run of a search, got {error}") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    os.replace(_written(path, content), path)


def _written(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # alone on all machines
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return temporary
