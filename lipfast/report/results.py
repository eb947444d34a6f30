"""What a comparison of methods found, and its form on disk."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
_BOUNDS = ("lipschitz_bound", "layer_bound_max")


@dataclass(frozen=True)
class MethodResult:
    """The measurements of one trained method; None where there is none.

    Times are in seconds, memory in bytes, accuracies are fractions in [0, 1] of the test set, and
    `certified` maps a radius to the fraction certified there. `error` holds the reason of a method
    that failed.
    """

    method: str
    label: str
    n_parameters: int | None = None
    epochs: int | None = None
    train_seconds: float | None = None
    train_seconds_per_epoch: float | None = None
    train_step_seconds: float | None = None
    inference_images_per_second: float | None = None
    train_memory_bytes: int | None = None
    inference_memory_bytes: int | None = None
    accuracy: float | None = None
    certified: dict[float, float] = field(default_factory=dict)
    lipschitz_bound: float | None = None
    layer_bound_max: float | None = None
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the method has a reason of failure in place of measurements."""
        return self.error is not None


@dataclass(frozen=True)
class Comparison:
    """The results of several methods on one data set, and what they were measured on.

    `machine` describes the hardware in words, `versions` names software and version, `date` is an
    ISO 8601 time, `config` holds what was asked for (network, seed, one recipe per method).
    """

    results: tuple[MethodResult, ...]
    dataset: str
    device: str
    machine: str
    versions: dict[str, str]
    date: str
    config: dict[str, Any]

    @property
    def finished(self) -> tuple[MethodResult, ...]:
        """The results of the methods that did not fail."""
        return tuple(r for r in self.results if not r.failed)

    @property
    def failures(self) -> tuple[MethodResult, ...]:
        """The results of the methods that failed."""
        return tuple(r for r in self.results if r.failed)

    @property
    def radii(self) -> tuple[float, ...]:
        """The radii certified by any method, ascending."""
        return tuple(sorted({radius for r in self.results for radius in r.certified}))

    def to_json(self) -> str:
        """Return the comparison as a JSON text that `from_json` reads back without loss."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        for result in document["results"]:
            result["certified"] = [
                {"radius": radius, "accuracy": value}
                for radius, value in result["certified"].items()
            ]
            for key in _BOUNDS:
                result[key] = json_number(result[key])
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """Read a comparison from the text that `to_json` wrote.

        Raises ValueError when the text is not JSON or not such a comparison.
        """
        try:
            document = json.loads(text)
            if document.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            results = tuple(_result_from(entry) for entry in document.pop("results"))
            return cls(results=results, **document)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"text: expected a comparison as JSON, got {error}") from error

    def save(self, path: Path | str) -> None:
        """Write the comparison to a JSON file; a reader never sees half of it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.to_json(), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path | str) -> Comparison:
        """Read a comparison from a JSON file.

        Raises FileNotFoundError when there is none, ValueError when it holds something else.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def json_number(value: float | None) -> float | str | None:
    """Return a number as JSON can hold it: "inf", "-inf" and "nan" are texts that float() reads."""
    return value if value is None or math.isfinite(value) else str(value)


def _result_from(entry: dict[str, Any]) -> MethodResult:
    fields = dict(entry)
    fields["certified"] = {float(c["radius"]): float(c["accuracy"]) for c in entry["certified"]}
    for key in _BOUNDS:
        if isinstance(fields.get(key), str):
            fields[key] = float(fields[key])
    return MethodResult(**fields)
