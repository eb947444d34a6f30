"""The quantities that tables and plots show, each with its unit and its better direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lipfast.report.radii import radius_label
from lipfast.report.results import Comparison, MethodResult

MIB = 2.0**20
HEADLINE_RADIUS = 36 / 255


@dataclass(frozen=True)
class Metric:
    """One quantity of a result: `value` reads it in the unit shown, None where it is missing.

    `ratio` is true where values compare by their ratio (times, memory), false where they compare
    by their difference (percentages).
    """

    key: str
    name: str
    unit: str
    lower_is_better: bool
    ratio: bool
    value: Callable[[MethodResult], float | None]
    definition: str

    def text(self, result: MethodResult) -> str:
        """Return the value for people, without the unit; an en dash where it is missing."""
        value = self.value(result)
        return "–" if value is None else self.format(value)

    def format(self, value: float) -> str:
        """Return a value of this quantity for people, without the unit."""
        return significant(value) if self.ratio else f"{value:.1f}"

    def best(self, results: Sequence[MethodResult]) -> float | None:
        """Return the best value among results, None where none has one."""
        values = [v for v in map(self.value, results) if v is not None]
        if not values:
            return None
        return min(values) if self.lower_is_better else max(values)


def six_metrics() -> tuple[Metric, ...]:
    """Return the six quantities compared in Prach et al., CVPR 2024, figure 1."""
    return (*_COST, _ACCURACY, certified_metric(HEADLINE_RADIUS))


def all_metrics(comparison: Comparison) -> tuple[Metric, ...]:
    """Return times, memory, accuracy, and certified robust accuracy at each radius."""
    return (*_COST, _ACCURACY, *(certified_metric(radius) for radius in comparison.radii))


def certified_metric(radius: float) -> Metric:
    """Return the certified robust accuracy at one radius, in percent."""
    label = radius_label(radius)
    return Metric(
        f"certified_{label.replace('/', '_')}",
        f"Certified at {label}",
        "%",
        False,
        False,
        partial(_certified_percent, radius),
        f"test images classified correctly for every perturbation up to l2 norm {label}, "
        "pixels in [0, 1]",
    )


def significant(value: float) -> str:
    """Write a number with three significant digits, without an exponent from 0.001 to 10^6."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    decimals = next((d for limit, d in ((100, 0), (10, 1), (1, 2)) if abs(value) >= limit), 3)
    return f"{value:.{decimals}f}"


def parameter_count(count: int | None) -> str:
    """Write a number of parameters as "49.6k" or "1.57M"; an en dash for None."""
    if count is None:
        return "–"
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{significant(count / limit)}{suffix}"
    return str(count)


def bound_text(bound: float | None) -> str:
    """Write a Lipschitz bound so that its distance from 1 shows; an en dash for None."""
    if bound is None:
        return "–"
    excess = bound - 1
    if excess == 0 or abs(excess) > 1e-3:
        return f"{bound:.4g}"
    return f"1 {'+' if excess > 0 else '-'} {abs(excess):.1e}"


def _scaled(attribute: str, factor: float, result: MethodResult) -> float | None:
    value = getattr(result, attribute)
    return None if value is None else value * factor


def _microseconds_per_image(result: MethodResult) -> float | None:
    speed = result.inference_images_per_second
    return None if speed is None else 1e6 / speed


def _certified_percent(radius: float, result: MethodResult) -> float | None:
    value = result.certified.get(radius)
    return None if value is None else 100 * value


_COST = (
    Metric(
        "train_time",
        "Training time",
        "s/epoch",
        True,
        True,
        partial(_scaled, "train_seconds_per_epoch", 1.0),
        "wall-clock seconds per training epoch, data loading and augmentation included",
    ),
    Metric(
        "inference_time",
        "Inference time",
        "µs/image",
        True,
        True,
        _microseconds_per_image,
        "median over repeated batches after warm-up, in eval mode with cached weights, "
        "without gradients",
    ),
    Metric(
        "train_memory",
        "Training memory",
        "MiB",
        True,
        True,
        partial(_scaled, "train_memory_bytes", 1 / MIB),
        "peak of one training step: parameters, gradients, momentum, saved activations and "
        "temporaries; from the allocator on CUDA, from the live tensors on a CPU",
    ),
    Metric(
        "inference_memory",
        "Inference memory",
        "MiB",
        True,
        True,
        partial(_scaled, "inference_memory_bytes", 1 / MIB),
        "peak of one batch in eval mode: parameters, buffers, cached weights, activations and "
        "temporaries; from the allocator on CUDA, from the live tensors on a CPU",
    ),
)
_ACCURACY = Metric(
    "accuracy",
    "Accuracy",
    "%",
    False,
    False,
    partial(_scaled, "accuracy", 100.0),
    "test images classified correctly",
)
