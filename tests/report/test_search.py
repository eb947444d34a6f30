"""The random search: draws, shares of several processes, resuming, failures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lipfast.data import load
from lipfast.report import search as module
from lipfast.report.budget import epoch_seconds, epochs_in
from lipfast.report.experiment import Experiment, adapted_recipe
from lipfast.report.search import Search, Trial, best_trials, drawn, load_best, split


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """No training: a run reaches the more the larger its learning rate; returns what was run."""
    runs: list[tuple[str, str, int]] = []

    def train(self, method, size, run, train_set, held_out):
        runs.append((method, size, run))
        lr, decay = drawn(self.seed, method, size, run)
        return Trial(method, size, run, lr, decay, 1, certified=lr, accuracy=min(1.0, 2 * lr))

    monkeypatch.setattr(Search, "_train", train)
    return runs


def search(out: Path, **changes) -> Search:
    options = {"methods": ("aol", "soc"), "sizes": ("XS", "S"), "runs": 3, "epochs": 1}
    return Search("digits", out=out, **{**options, **changes})


def test_draws_fill_the_papers_ranges_and_repeat():
    draws = [drawn(0, "aol", "XS", run) for run in range(400)]
    logs = torch.tensor(draws, dtype=torch.float64).log10()
    low, high = logs.amin(0), logs.amax(0)
    assert -4 <= low[0] < -3.9
    assert -1.1 < high[0] <= -1
    assert -5.5 <= low[1] < -5.4
    assert -3.6 < high[1] <= -3.5
    assert abs(float(torch.corrcoef(logs.T)[0, 1])) < 0.15
    assert drawn(0, "aol", "XS", 3) == draws[3]
    others = {drawn(1, "aol", "XS", 3), drawn(0, "soc", "XS", 3), drawn(0, "aol", "S", 3)}
    assert draws[3] not in others


def test_processes_share_the_runs(tmp_path, trained):
    plan = search(tmp_path)
    first = plan.run((0, 2), log=lambda line: None)
    assert len(first) == len(trained) == 6
    both = plan.run((1, 2), log=lambda line: None)
    assert len(both) == len(trained) == 12
    assert len(set(trained)) == 12


def test_a_search_goes_on_where_it_stopped(tmp_path, trained):
    plan = search(tmp_path)
    plan.run(log=lambda line: None)
    plan._path("aol", "XS", 1).unlink()
    trained.clear()
    assert len(plan.run(log=lambda line: None)) == 12
    assert trained == [("aol", "XS", 1)]
    more = replace(plan, runs=4)
    assert len(more.run(log=lambda line: None)) == 16


def test_other_settings_need_another_folder(tmp_path, trained):
    search(tmp_path).run(log=lambda line: None)
    with pytest.raises(ValueError, match="search with seed 0, asked for was 1"):
        search(tmp_path, seed=1).run(log=lambda line: None)


def test_the_best_run_is_that_with_the_highest_certified_accuracy(tmp_path, trained):
    results = search(tmp_path).run(log=lambda line: None)
    best = best_trials(results)
    assert set(best) == {(m, s) for m in ("aol", "soc") for s in ("XS", "S")}
    for (method, size), trial in best.items():
        assert trial.lr == max(drawn(0, method, size, run)[0] for run in range(3))
    assert load_best(tmp_path, "digits") == best
    with pytest.raises(ValueError, match="search on cifar10, got one on digits"):
        load_best(tmp_path, "cifar10")
    failed = replace(results[0], certified=None, accuracy=None, error="diverged")
    assert best_trials([failed]) == {}


def test_a_folder_without_results(tmp_path):
    with pytest.raises(ValueError, match="finished runs"):
        load_best(tmp_path, "digits")


def test_files_that_no_search_wrote_are_named(tmp_path, trained):
    search(tmp_path).run(log=lambda line: None)
    for text in ("", "{}", "[1]", '{"x": 1}'):
        (tmp_path / "trials" / "aol-XS-001.json").write_text(text)
        with pytest.raises(ValueError, match=r"aol-XS-001\.json: expected"):
            search(tmp_path).results()


def test_a_real_search_trains_and_keeps_failures(tmp_path, monkeypatch):
    lines: list[str] = []
    plan = search(tmp_path, methods=("aol",), sizes=("XS",), runs=2)
    results = plan.run(log=lines.append)
    assert [r.epochs for r in results] == [1, 1]
    assert all(0 <= r.certified <= r.accuracy <= 1 for r in results)
    assert lines[0].startswith("AOL XS 1/2: lr ")

    def diverge(*args, **kwargs):
        raise RuntimeError("training diverged")

    monkeypatch.setattr(module, "train", diverge)
    (trial,) = replace(plan, out=tmp_path / "other", runs=1).run(log=lines.append)
    assert trial.error == "training diverged"
    assert lines[-1].endswith("failed: training diverged")


def test_epochs_from_hours_are_the_same_for_every_process(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "epochs_in", lambda experiment, hours: 2)
    plan = search(tmp_path, methods=("aol",), sizes=("XS",), runs=1, epochs=None, hours=0.5)
    (trial,) = plan.run(log=lambda line: None)
    assert trial.epochs == 2
    stored = json.loads((tmp_path / "epochs" / "aol-XS.json").read_text())
    assert stored == {"epochs": 2}


def test_epochs_fill_the_time():
    recipe = adapted_recipe("digits", "aol")
    experiment = Experiment("aol", recipe, *load("digits"), 0, "cpu")
    seconds = epoch_seconds(experiment)
    assert 0 < seconds < 30
    epochs = epochs_in(experiment, 1.0)
    assert 3600 / (4 * seconds) < epochs < 4 * 3600 / seconds
    assert epochs_in(experiment, 1e-9) == 1
    for hours in (0, -1, math.nan):
        with pytest.raises(ValueError, match="hours"):
            epochs_in(experiment, hours)


def test_held_out_images_are_a_part_of_the_training_images():
    dataset = load("digits")[0]
    kept, held_out = split(dataset, 0.1, seed=0)
    assert len(held_out) == round(0.1 * len(dataset))
    assert len(kept) + len(held_out) == len(dataset)
    together = torch.cat([kept.images, held_out.images]).flatten(1).double()
    weights = torch.rand(together.shape[1], dtype=torch.float64)
    everything = dataset.images.flatten(1).double()
    assert torch.equal((together @ weights).sort()[0], (everything @ weights).sort()[0])
    assert torch.equal(split(dataset, 0.1, seed=0)[1].labels, held_out.labels)
    assert not torch.equal(split(dataset, 0.1, seed=1)[1].images, held_out.images)
    with pytest.raises(ValueError, match="held_out"):
        split(dataset, 1e-6, seed=0)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"methods": ("eco",)}, "methods"),
        ({"runs": 0}, "runs"),
        ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed"),
        ({"held_out": 1.0}, "held_out"),
        ({"hours": 0.0, "epochs": None}, "hours"),
        ({"hours": 1.0}, "hours"),
    ],
)
def test_bad_arguments(tmp_path, changes, name):
    with pytest.raises(ValueError, match=name):
        search(tmp_path, **changes)
    with pytest.raises(ValueError, match="job"):
        search(tmp_path).run((2, 2))
