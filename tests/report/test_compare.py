import json
import math
from pathlib import Path

import pytest
import torch

import lipfast.report.compare as module
from lipfast.report import Comparison
from lipfast.report.compare import plan_comparison
from lipfast.report.experiment import Experiment, adapted_recipe, available_device
from lipfast.training import TrainingDiverged


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipfast.report.measure.MINIMUM_SECONDS", 0.0)
    monkeypatch.setattr("lipfast.report.measure.MINIMUM_REPEATS", 1)


def test_two_methods_from_end_to_end(tmp_path: Path) -> None:
    lines: list[str] = []
    plan = plan_comparison("digits", ["cpl", "aol"], tmp_path, epochs=1)
    comparison, files = plan.run(log=lines.append)
    assert [r.method for r in comparison.results] == ["aol", "cpl"]
    for result in comparison.finished:
        assert result.epochs == 1
        assert (result.n_parameters or 0) > 10_000
        assert result.lipschitz_bound is not None
        assert result.layer_bound_max is not None
        assert result.layer_bound_max <= 1 + 1e-6
        assert result.lipschitz_bound <= (1 + 1e-6) ** 8
        accuracies = [result.accuracy, *result.certified.values()]
        assert all(a is not None and 0 <= a <= 1 for a in accuracies)
        assert accuracies == sorted(accuracies, reverse=True)
        assert math.isclose((result.accuracy or 0) * 360, round((result.accuracy or 0) * 360))
        for measured in (
            result.train_seconds_per_epoch,
            result.train_step_seconds,
            result.inference_images_per_second,
        ):
            assert measured is not None
            assert measured > 0
        parameter_bytes = 4 * (result.n_parameters or 0)
        assert (result.train_memory_bytes or 0) > 3 * parameter_bytes
        assert (result.inference_memory_bytes or 0) > parameter_bytes
    assert all(file.stat().st_size > 0 for file in files)
    assert Comparison.load(tmp_path / "comparison.json") == comparison
    assert (tmp_path / "aol" / "last.safetensors").exists()
    assert [line.split(":")[0] for line in lines] == ["[1/2] AOL"] * 2 + ["[2/2] CPL"] * 2

    def no_training(*_: object, **__: object) -> None:
        pytest.fail("a finished method was trained again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", no_training)
        again, _ = plan_comparison("digits", ["cpl"], tmp_path, epochs=1, resume=True).run()
    assert again.results == comparison.results
    with pytest.raises(ValueError, match=r"recipe of cpl is .*'epochs': 1.*asked for was"):
        plan_comparison("digits", ["cpl"], tmp_path, epochs=2, resume=True)
    with pytest.raises(ValueError, match="its seed is 0, asked for was 3"):
        plan_comparison("digits", ["cpl"], tmp_path, epochs=1, seed=3, resume=True)


def test_a_method_that_diverges_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.train

    def train(model, loader, config, **options):  # type: ignore[no-untyped-def]
        if config.lr == adapted_recipe("digits", "aol")["lr"]:
            raise TrainingDiverged(2, 5, config.lr, "the loss is nan", "lower the learning rate")
        return real(model, loader, config, **options)

    monkeypatch.setattr(module, "train", train)
    plan = plan_comparison("digits", ["aol", "cpl"], tmp_path, epochs=1)
    comparison, files = plan.run(log=lambda line: None)
    assert [r.method for r in comparison.failures] == ["aol"]
    assert "the loss is nan in epoch 2, step 5" in str(comparison.failures[0].error)
    assert [r.method for r in comparison.finished] == ["cpl"]
    assert "AOL failed" in (tmp_path / "table.md").read_text()
    assert len(files) == 10

    monkeypatch.setattr(module, "train", real)
    lines: list[str] = []
    plan = plan_comparison("digits", ["aol", "cpl"], tmp_path, epochs=1, resume=True)
    comparison, _ = plan.run(log=lines.append)
    assert not comparison.failures
    assert "kept from" in lines[-1]
    config = json.loads((tmp_path / "comparison.json").read_text())["config"]
    assert set(config["recipes"]) == {"aol", "cpl"}


def test_a_programming_error_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(KeyError, match="a bug"):
        plan_comparison("digits", ["cpl"], tmp_path, epochs=1).run(log=lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["aol", "xyz"]}, "methods: expected some of aol, .* got xyz"),
        ({"methods": []}, "methods: expected some of aol, .* got none"),
        ({"dataset": "mnist"}, "dataset must be one of digits, .* got 'mnist'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"size": "XXL"}, "size: expected one of XS, S, M, L, got 'XXL'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_input_is_refused_before_training(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    given = {"dataset": "digits", "methods": ["aol"], "out": tmp_path / "out", **arguments}
    with pytest.raises(ValueError, match=message):
        plan_comparison(**given)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_experiment_is_seeded_and_leaves_the_global_random_state(tmp_path: Path) -> None:
    plan = plan_comparison("digits", ["sll"], tmp_path, size="XS", seed=7)
    (experiment,) = plan.experiments
    assert isinstance(experiment, Experiment)
    state = torch.get_rng_state()
    first, second = experiment.model(), experiment.model()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    (other,) = plan_comparison("digits", ["sll"], tmp_path, size="XS", seed=8).experiments
    assert not torch.equal(next(first.parameters()), next(other.model().parameters()))
    assert first.config["size"] == "XS"


def test_recipe_changes() -> None:
    plain, changed = adapted_recipe("digits", "aol"), adapted_recipe("digits", "aol", lr=0.5)
    assert changed == {**plain, "lr": 0.5}
    assert adapted_recipe("digits", "aol", epochs=None) == plain
    with pytest.raises(ValueError, match="momentum: expected one of epochs"):
        adapted_recipe("digits", "aol", momentum=0.5)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match='device: expected "cpu", "cuda" or "cuda:N", got'):
        available_device(name)


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_device(None) == "cpu"
    with pytest.raises(ValueError, match="device: expected one that torch can use, got 'cuda:1'"):
        available_device("cuda:1")


def test_epochs_of_a_time_budget_outlive_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "epochs_in", lambda experiment, hours: 2)
        patch.setattr(module, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan_comparison("digits", ["aol"], tmp_path, hours=1).run(log=lambda line: None)
    monkeypatch.setattr(module, "epochs_in", lambda experiment, hours: 3)
    plan = plan_comparison("digits", ["aol"], tmp_path, hours=1, resume=True)
    assert plan.experiments[0].recipe["epochs"] == 2


def test_tuned_hyperparameters_need_a_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tuned: expected a size"):
        plan_comparison("digits", ["aol"], tmp_path, tuned=tmp_path)
