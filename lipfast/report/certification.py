"""The certification of one checkpoint: its data, and its figures as lines and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from lipfast.certify import CertificationReport
from lipfast.data import DeviceLoader, channel_mean, load
from lipfast.report.metrics import bound_text
from lipfast.report.radii import radius_label
from lipfast.report.results import json_number

TEST_BATCH_SIZE = 256


def checkpoint_loader(
    model: nn.Module,
    metadata: dict[str, Any],
    dataset: str,
    data_root: Path | str | None,
    device: str,
) -> DeviceLoader:
    """Return the test images that fit a checkpoint of `lipfast train`.

    Raises ValueError when the checkpoint was trained on another data set, and what
    `lipfast.data.load` raises.
    """
    train_set, test_set = load(dataset, data_root)
    trained_on = (metadata.get("data") or {}).get("name", dataset)
    if trained_on != dataset:
        raise ValueError(f"data: expected {trained_on}, as in training, got {dataset}")
    return DeviceLoader(
        test_set,
        TEST_BATCH_SIZE,
        mean=channel_mean(train_set),
        train=False,
        augment=None,
        device=device,
    )


def certification_lines(report: CertificationReport) -> list[str]:
    """Return the figures for people, one per line."""
    name, worst = max(report.layer_bounds.items(), key=lambda item: item[1])
    rows = [("test images", str(report.n_samples)), ("accuracy", _percent(report.accuracy))]
    rows += [(f"certified at {radius_label(r)}", _percent(v)) for r, v in report.certified.items()]
    rows += [
        ("Lipschitz bound", bound_text(report.lipschitz_bound)),
        ("largest layer bound", f"{bound_text(worst)} ({name})"),
    ]
    width = max(len(label) for label, _ in rows)
    return [f"{label.ljust(width)}  {text}" for label, text in rows]


def certification_json(report: CertificationReport, checkpoint: str, dataset: str) -> str:
    """Return the figures in full as a JSON text; accuracies are fractions."""
    document = {
        "checkpoint": checkpoint,
        "dataset": dataset,
        "n_samples": report.n_samples,
        "accuracy": report.accuracy,
        "certified": [
            {"radius": radius, "label": radius_label(radius), "accuracy": value}
            for radius, value in report.certified.items()
        ],
        "lipschitz_bound": json_number(report.lipschitz_bound),
        "layer_bounds": {k: json_number(v) for k, v in report.layer_bounds.items()},
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
