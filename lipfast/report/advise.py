"""Which method and size to train under a budget, by published, counted and measured figures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lipfast.models import SIZES, ConvNet
from lipfast.nn import METHODS
from lipfast.report import published
from lipfast.report.measure import out_of_memory, training_memory_bytes
from lipfast.training import margin_cross_entropy

MEMORY_RESERVE = 0.1  # of a device: context, fragmentation, libraries


@dataclass(frozen=True)
class Budget:
    """What a network may cost; None where that does not matter.

    Args:
        memory_bytes: of the device, in training.
        train_seconds: of the whole training run.
        inference_seconds: per image, in batches of `batch_size`.
        side: height and width of the images, a power of two.
        classes: number of classes.
        images: of the training set.
        batch_size: of training.
        min_epochs: fewest epochs that count as training.

    Raises:
        ValueError: a number is out of range.
    """

    memory_bytes: float | None = None
    train_seconds: float | None = None
    inference_seconds: float | None = None
    side: int = published.SIDE
    classes: int = 10
    images: int = published.IMAGES
    batch_size: int = published.BATCH_SIZE
    min_epochs: int = 100

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "train_seconds", "inference_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        for name in ("images", "batch_size", "min_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        if self.side < 2 or self.side & (self.side - 1):
            raise ValueError(f"side: expected a power of two >= 2, got {self.side!r}")
        if self.classes < 2:
            raise ValueError(f"classes: expected an integer >= 2, got {self.classes!r}")

    def network(self, method: str, size: str) -> ConvNet:
        """The network of a method for these images."""
        channels = (3, self.side, self.side)
        return ConvNet(method, size, input_size=channels, n_classes=self.classes)


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from: measured here, counted, or published.

    `relation` is "=", or "<=" and ">=" where the number bounds the true one.
    """

    value: float
    source: str
    relation: str = "="


@dataclass(frozen=True)
class Candidate:
    """One method and size: its figures, None where nobody knows.

    `objection` says why it is left out, None where it is not; `unknown` names the limits of the
    budget that could not be checked.
    """

    method: str
    size: str
    certified: Figure | None = None
    accuracy: Figure | None = None
    epoch_seconds: Figure | None = None
    inference_seconds: Figure | None = None
    memory_bytes: Figure | None = None
    objection: str | None = None
    unknown: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Method and size for people."""
        return f"{METHODS[self.method].label} {self.size}"


@dataclass(frozen=True)
class Advice:
    """Candidates that fit, best first, those with nothing unknown before the others; the rest."""

    fitting: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    notes: tuple[str, ...]


def advise(
    budget: Budget,
    *,
    device: str = "cpu",
    measure: bool = False,
    alternatives: int = 4,
    log: Callable[[str], None] = lambda line: None,
) -> Advice:
    """Recommend the method and size with the best published certified robust accuracy that fits.

    Candidates are tried in the order of their published certified robust accuracy on CIFAR-10
    until one and `alternatives` more fit for sure. Memory is counted: the peak of a training step
    with SGD and momentum, of tensors without values, times 1.1. Times are published (the authors'
    code on an A100) unless `measure`.

    Args:
        budget: what the network may cost.
        device: where to measure.
        measure: time a training step and inference of each candidate here, which takes minutes.
        alternatives: how many more to find.
        log: called with one line per measured candidate.
    """
    fitting: list[Candidate] = []
    rejected: list[Candidate] = []
    without_times = budget.side != published.SIDE and not measure
    for method, size in _by_published_accuracy():
        if sum(without_times or not candidate.unknown for candidate in fitting) > alternatives:
            break
        candidate = _judged(budget, method, size, device, measure)
        (rejected if candidate.objection else fitting).append(candidate)
        if measure:
            log(f"{candidate.name}: {candidate.objection or 'fits'}")
    fitting.sort(key=lambda candidate: bool(candidate.unknown))  # keeps the order within both
    return Advice(
        tuple(fitting[: alternatives + 1]), tuple(rejected), tuple(_notes(budget, measure))
    )


def parse_bytes(text: str) -> float:
    """Return the bytes of a text such as "8GB", "512 MiB" or "1e9"; ValueError for others."""
    units: dict[str, float] = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    units |= {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "b": 1, "": 1}
    stripped = text.strip().lower()
    unit = stripped.lstrip("0123456789.e+-").strip() if stripped else ""
    number = stripped[: len(stripped) - len(unit)].strip()
    try:
        value = float(number) * units[unit]
    except (KeyError, ValueError):
        raise ValueError(f"memory: expected a number with B to TB or TiB, got {text!r}") from None
    if not 0 < value < math.inf:
        raise ValueError(f"memory: expected a number > 0, got {text!r}")
    return value


def _by_published_accuracy() -> Iterator[tuple[str, str]]:
    known = [
        (figures[place][1], method, size)  # type: ignore[index]
        for method, figures in published.ACCURACY.items()
        for place, size in enumerate(SIZES)
        if figures[place] is not None
    ]
    for _, method, size in sorted(known, key=lambda entry: -entry[0]):
        yield method, size


def _judged(budget: Budget, method: str, size: str, device: str, measure: bool) -> Candidate:
    place = list(SIZES).index(size)
    accuracy = published.ACCURACY[method][place]
    assert accuracy is not None
    certified, clean = Figure(accuracy[1], "published"), Figure(accuracy[0], "published")
    try:
        memory = Figure(_counted_memory(budget, method, size), "counted")
    except ValueError as error:  # more classes than the network has outputs
        return Candidate(method, size, certified, clean, objection=str(error))
    epoch, inference = _published_times(budget, method, place)
    limit = budget.memory_bytes
    too_large = limit is not None and memory.value > limit
    objection = f"needs {memory.value / 2**30:.1f} GiB" if too_large else None
    if measure and not too_large:
        try:
            epoch, inference = _measured_times(budget, method, size, device)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            objection = "does not fit in the memory here"
    unknown = []
    if budget.train_seconds is not None:
        if epoch is None:
            unknown.append("training time")
        elif (epochs := budget.train_seconds / epoch.value) < budget.min_epochs:
            objection = objection or (
                f"{epochs:.0f} epochs in the time, fewer than {budget.min_epochs}"
            )
    if budget.inference_seconds is not None:
        slow = inference is not None and inference.value > budget.inference_seconds
        if inference is None or inference.relation == ("<=" if slow else ">="):
            unknown.append("inference time")
        elif slow:
            objection = objection or f"{1e3 * inference.value:.3g} ms per image"
    return Candidate(
        method, size, certified, clean, epoch, inference, memory, objection, tuple(unknown)
    )


def _published_times(
    budget: Budget, method: str, place: int
) -> tuple[Figure | None, Figure | None]:
    """Those of an epoch and of an image; a smaller network than M takes at most as long as M."""
    if budget.side != published.SIDE:
        return None, None
    seconds = published.EPOCH_SECONDS[method][place]
    epoch = None
    if seconds is not None:
        epoch = Figure(seconds * budget.images / published.IMAGES, "published")
    medium = list(SIZES).index("M")
    relation = "=" if place == medium else "<=" if place < medium else ">="
    speed = published.INFERENCE_IMAGES_PER_SECOND[method]
    return epoch, Figure(1 / speed, "published", relation)


def _counted_memory(budget: Budget, method: str, size: str) -> float:
    with FakeTensorMode():
        model = budget.network(method, size)
        x, y = _batch(budget, "cpu")
        return training_memory_bytes(model, x, y) * (1 + MEMORY_RESERVE)


def _measured_times(budget: Budget, method: str, size: str, device: str) -> tuple[Figure, Figure]:
    model = budget.network(method, size).to(device)
    x, y = _batch(budget, device)
    parameters = list(model.parameters())
    step = _seconds(
        lambda: torch.autograd.grad(margin_cross_entropy(model(x), y), parameters), device
    )
    model.eval()
    with torch.no_grad():
        batch = _seconds(lambda: model(x), device)
    steps = math.ceil(budget.images / budget.batch_size)
    return Figure(step * steps, "measured"), Figure(batch / len(x), "measured")


def _batch(budget: Budget, device: str) -> tuple[Tensor, Tensor]:
    shape = (budget.batch_size, 3, budget.side, budget.side)
    labels = torch.zeros(budget.batch_size, dtype=torch.long, device=device)
    return torch.rand(shape, device=device), labels


def _seconds(function: Callable[[], object], device: str) -> float:
    """Of the faster of two calls, after one that warms up."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _notes(budget: Budget, measure: bool) -> Iterator[str]:
    yield (
        "Accuracies are published: CIFAR-10 after 24 hours on an A100 with the authors' code"
        + (
            "."
            if (budget.side, budget.classes) == (published.SIDE, 10)
            else "; for other images they are a ranking, not a forecast."
        )
    )
    yield "Memory is counted: the peak of a training step, and a tenth more."
    if measure:
        yield "Times are measured here: a training step and inference, data loading not included."
    else:
        yield (
            "Times are published: the authors' code on an A100, for 32x32 images, inference for "
            "size M alone. --measure takes those of this machine."
        )
