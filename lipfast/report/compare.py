"""Train, certify and measure several methods on one data set."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lipfast import certify
from lipfast.data import load
from lipfast.nn import METHODS
from lipfast.report.budget import epochs_in
from lipfast.report.experiment import Experiment, adapted_recipe
from lipfast.report.machine import machine_description, software_versions
from lipfast.report.measure import (
    inference_memory_bytes,
    inference_seconds,
    training_memory_bytes,
    training_step_seconds,
)
from lipfast.report.results import Comparison, MethodResult
from lipfast.report.search import load_best
from lipfast.report.write import RESULTS_FILE, write_report
from lipfast.training import CHECKPOINT_NAME, train


@dataclass(frozen=True)
class ComparisonPlan:
    """Checked experiments, the folder they write to, and what an earlier run finished there."""

    experiments: tuple[Experiment, ...]
    out: Path
    resume: bool
    start: Comparison

    def run(
        self, *, progress: bool = False, log: Callable[[str], None] = print
    ) -> tuple[Comparison, list[Path]]:
        """Train, certify and measure one method after another, and write the report.

        A method that fails (divergence, out of memory) keeps its reason, and the others go on.
        Before the first and after each method comparison.json is written; checkpoints are in one
        folder per method.

        Args:
            progress: show a progress bar in training.
            log: called with one line before and after each method.

        Returns:
            The comparison, and the files of the report.
        """
        comparison = self.start
        comparison.save(self.out / RESULTS_FILE)  # so that --resume knows the epochs of `hours`
        for place, experiment in enumerate(self.experiments, 1):
            label = METHODS[experiment.method].label
            prefix = f"[{place}/{len(self.experiments)}] {label}"
            if any(r.method == experiment.method for r in comparison.finished):
                log(f"{prefix}: kept from {self.out / RESULTS_FILE}")
                continue
            log(f"{prefix}: training, epochs: {experiment.recipe['epochs']}")
            folder = self.out / experiment.method
            try:
                result = _measured(experiment, folder, self.resume, progress)
            except (RuntimeError, ValueError, ArithmeticError) as error:
                reason = str(error) or type(error).__name__
                result = MethodResult(experiment.method, label, error=reason)
            comparison = _with_result(comparison, result)
            comparison.save(self.out / RESULTS_FILE)
            log(f"{prefix}: {_summary(result)}")
        return comparison, write_report(comparison, self.out)


def plan_comparison(
    dataset: str,
    methods: Sequence[str],
    out: Path | str,
    *,
    data_root: Path | str | None = None,
    size: str | None = None,
    epochs: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    resume: bool = False,
    hours: float | None = None,
    tuned: Path | str | None = None,
) -> ComparisonPlan:
    """Load the data and check everything that can be wrong before anything is trained.

    Args:
        dataset: a name of `lipfast.data.NAMES`.
        methods: keys of `lipfast.nn.METHODS`; they run in the order of that table.
        out: folder of the report, made when missing; what it holds of an earlier run is replaced.
        data_root: folder of the data set; see `lipfast.data.load`.
        size: of the network, XS to L; None for that of the recipe.
        epochs: for every method; None for those of the recipes.
        seed: of weights, order and augmentation.
        device: where to train.
        resume: keep the methods that finished in `out`, and go on where the others stopped.
        hours: of each training, in place of `epochs`: as many as take that long, by a measurement
            now; the same as before where `out` is resumed.
        tuned: folder of a `lipfast.report.search.Search`, whose best runs for this size give
            learning rate and weight decay; None for the recipes'.

    Raises:
        ValueError: unknown data set, method or size; an argument out of range; the folder to
            resume holds a comparison with other settings.
        FileNotFoundError: the data set is not there.
    """
    out = Path(out)
    if hours is not None and epochs is not None:
        raise ValueError(f"hours: expected None where epochs are given, got {hours!r}")
    experiments = _experiments(dataset, methods, data_root, size, epochs, seed, device, tuned)
    earlier = None
    if resume and (out / RESULTS_FILE).exists():
        earlier = Comparison.load(out / RESULTS_FILE)
    if hours is not None:
        experiments = tuple(_lasting(e, hours, earlier) for e in experiments)
    start = _empty(dataset, seed, device, experiments, hours)
    if earlier is not None:
        start = _resumed(earlier, start, out)
    out.mkdir(parents=True, exist_ok=True)
    return ComparisonPlan(experiments, out, resume, start)


def _experiments(
    dataset: str,
    methods: Sequence[str],
    data_root: Path | str | None,
    size: str | None,
    epochs: int | None,
    seed: int,
    device: str,
    tuned: Path | str | None,
) -> tuple[Experiment, ...]:
    """One checked experiment per method, in the order of `METHODS`."""
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise ValueError(
            f"methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}"
        )
    chosen = [m for m in METHODS if m in methods]
    found = {m: _tuned(tuned, dataset, m, size) for m in chosen}
    recipes = {m: adapted_recipe(dataset, m, size=size, epochs=epochs, **found[m]) for m in chosen}
    sets = load(dataset, data_root)
    experiments = tuple(Experiment(m, recipes[m], *sets, seed, device) for m in chosen)
    for experiment in experiments:
        experiment.config()
    experiments[0].model()
    return experiments


def _tuned(
    folder: Path | str | None, dataset: str, method: str, size: str | None
) -> dict[str, float]:
    if folder is None:
        return {}
    if size is None:
        raise ValueError("tuned: expected a size of the network with it, got none")
    best = load_best(folder, dataset)
    if (method, size) not in best:
        known = ", ".join(f"{m} {s}" for m, s in best)
        raise ValueError(
            f"tuned: expected a finished run of {method} {size} in {folder}, got {known}"
        )
    trial = best[method, size]
    return {"lr": trial.lr, "weight_decay": trial.weight_decay}


def _lasting(experiment: Experiment, hours: float, earlier: Comparison | None) -> Experiment:
    """The experiment with as many epochs as fit, or those of an earlier part of this run."""
    known = {} if earlier is None else earlier.config["recipes"].get(experiment.method, {})
    if earlier is not None and earlier.config.get("hours") == hours and "epochs" in known:
        epochs = known["epochs"]
    else:
        epochs = epochs_in(experiment, hours)
    return replace(experiment, recipe={**experiment.recipe, "epochs": epochs})


def _empty(
    dataset: str, seed: int, device: str, experiments: Sequence[Experiment], hours: float | None
) -> Comparison:
    recipes: dict[str, dict[str, Any]] = {e.method: {**e.recipe} for e in experiments}
    networks = [recipe.pop("model") for recipe in recipes.values()]
    config: dict[str, Any] = {"seed": seed, "network": networks[0], "recipes": recipes}
    if hours is not None:
        config["hours"] = hours
    return Comparison(
        results=(),
        dataset=dataset,
        device=device,
        machine=machine_description(device),
        versions=software_versions(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        config=json.loads(json.dumps(config)),
    )


def _resumed(earlier: Comparison, planned: Comparison, out: Path) -> Comparison:
    """The planned comparison with what an earlier one with the same settings finished."""
    settings = [
        {"data": c.dataset, "device": c.device, "machine": c.machine, **c.config}
        for c in (earlier, planned)
    ]
    old_recipes, recipes = (s.pop("recipes") for s in settings)
    for method in old_recipes.keys() & recipes.keys():
        for s, r in zip(settings, (old_recipes, recipes), strict=True):
            s[f"recipe of {method}"] = r[method]
    old, new = settings
    differing = [key for key in old | new if old.get(key) != new.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{out / RESULTS_FILE} cannot be resumed with other settings: its {key} is "
            f"{old.get(key)}, asked for was {new.get(key)}; choose another folder, or start anew"
        )
    config = {**planned.config, "recipes": {**old_recipes, **recipes}}
    return replace(planned, results=earlier.finished, config=config)


def _with_result(comparison: Comparison, result: MethodResult) -> Comparison:
    results = {r.method: r for r in (*comparison.results, result)}
    ordered = tuple(results[m] for m in METHODS if m in results)
    return replace(comparison, results=ordered)


def _measured(experiment: Experiment, folder: Path, resume: bool, progress: bool) -> MethodResult:
    train_loader, test_loader = experiment.train_loader(), experiment.test_loader()
    x, y = next(iter(train_loader))
    train_memory = training_memory_bytes(experiment.model(), x, y)
    step_seconds = training_step_seconds(experiment.model(), x, y)

    model = experiment.model()
    trained = train(
        model,
        train_loader,
        experiment.config(),
        checkpoint_dir=folder,
        resume=resume and (folder / CHECKPOINT_NAME).exists(),
        progress=progress,
    )
    certified = certify.report(model, test_loader)
    x, _ = next(iter(test_loader))
    return MethodResult(
        method=experiment.method,
        label=METHODS[experiment.method].label,
        n_parameters=sum(p.numel() for p in model.parameters()),
        epochs=trained.epochs,
        train_seconds=trained.seconds,
        train_seconds_per_epoch=trained.seconds_per_epoch,
        train_step_seconds=step_seconds,
        inference_images_per_second=len(x) / inference_seconds(model, x),
        train_memory_bytes=train_memory,
        inference_memory_bytes=inference_memory_bytes(model, x),
        accuracy=certified.accuracy,
        certified=certified.certified,
        lipschitz_bound=certified.lipschitz_bound,
        layer_bound_max=max(certified.layer_bounds.values()),
    )


def _summary(result: MethodResult) -> str:
    if result.failed:
        return f"failed: {' '.join(str(result.error).split())}"
    robust = result.certified[certify.RADII[0]]
    return (
        f"{result.train_seconds:.0f} s, accuracy {100 * (result.accuracy or 0):.1f} %, "
        f"certified at 36/255 {100 * robust:.1f} %"
    )
