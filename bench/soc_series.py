"""SOC's series and norm on the digits, paired seeds: python bench/soc_series.py [SEEDS]."""

import functools
import statistics
import sys
from typing import Any

import torch

from lipfast import certify
from lipfast.data import load
from lipfast.nn import METHODS, Method, SOCConv2d, SOCLinear
from lipfast.report.experiment import Experiment, adapted_recipe
from lipfast.training import train

RADII = (36 / 255, 72 / 255, 108 / 255)
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {"series": "taylor", "norm": "unfolding"},
    "default": {},
}


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    print("| variant | seed | accuracy | 36 | 72 | 108 | 6 terms in evaluation |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        for name, arguments in VARIANTS.items():
            row, other = percentages(arguments, seed)
            rows[name].append(row)
            print(f"| {name} | {seed} | {cells(row)} | {cells(other)} |", flush=True)
    for name, values in rows.items():
        print_spread(name, values)
    paired = zip(rows["published"], rows["default"], strict=True)
    gains = [[b - a for a, b in zip(*pair, strict=True)] for pair in paired]
    print_spread("default - published", gains)


def percentages(arguments: dict[str, Any], seed: int) -> tuple[list[float], list[float]]:
    """Accuracy and certified accuracies, as trained and with 6 terms in evaluation."""
    METHODS["soc"] = Method(
        "SOC",
        functools.partial(SOCConv2d, **arguments),  # type: ignore[arg-type]
        functools.partial(SOCLinear, **arguments),  # type: ignore[arg-type]
    )
    sets = load("digits")
    experiment = Experiment("soc", adapted_recipe("digits", "soc"), *sets, seed=seed, device="cpu")
    model = experiment.model()
    train(model, experiment.train_loader(), experiment.config(), progress=False)
    state = model.state_dict()
    results = []
    for changes in ({}, {"eval_terms": 6}):
        METHODS["soc"] = Method(
            "SOC",
            functools.partial(SOCConv2d, **arguments | changes),  # type: ignore[arg-type]
            functools.partial(SOCLinear, **arguments | changes),  # type: ignore[arg-type]
        )
        model = experiment.model()
        model.load_state_dict(state)
        report = certify.report(model, experiment.test_loader(), radii=RADII)
        results.append([100 * value for value in (report.accuracy, *report.certified.values())])
    return results[0], results[1]


def print_spread(name: str, rows: list[list[float]]) -> None:
    columns = list(zip(*rows, strict=True))
    shown = [f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns]
    print(f"| {name} | mean ± deviation | {' | '.join(shown)} | |", flush=True)


def cells(row: list[float]) -> str:
    return " | ".join(f"{value:.1f}" for value in row)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
