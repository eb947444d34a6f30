"""Sharded construction of weights in two and four gloo processes against one process."""

from pathlib import Path

import pytest
from processes import run_ranks

from lipfast.nn import METHODS

WORKER = Path(__file__).with_name("shard_worker.py")
SAME = 1e-6

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = (
        "same as one process",
        "special models",
        "shares",
        "map sizes",
        "backward twice",
        "gradient penalty",
        "accumulation",
        "left out",
        "autocast",
        "alone",
        "errors",
    )
    return run_ranks(WORKER, 2, tmp_path_factory.mktemp("two"), *cases)


@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_one_process(results, method):
    for result in results:
        parameters, outputs = result["same as one process"][method]
        assert parameters < SAME
        assert outputs < SAME


def test_operations_are_divided(results):
    shares = [result["shares"] for result in results]
    assert sum(share["own layers"] for share in shares) == shares[0]["layers"]
    assert sum(share["own share"] for share in shares) == pytest.approx(1)
    for share in shares:
        assert share["construction"] > 0.9  # of a step's operations: what there is to divide
        assert share["own share"] < 0.55


@pytest.mark.parametrize(
    "model",
    [
        "shared layer",
        "two dtypes",
        "methods mixed",
        "frozen",
        "a layer in eval mode",
        "fused",
        "fused later",
        "first step",
    ],
)
def test_gradients_of_special_models(results, model):
    assert all(result["special models"][model] < SAME for result in results)


def test_maps_of_two_sizes(results):
    assert all(result["map sizes"] < SAME for result in results)


def test_backward_twice(results):
    for result in results:
        assert result["backward twice"]["doubled"] == 0
        assert "second time" in result["backward twice"]["again"]
        assert "once_differentiable" in result["backward twice"]["second derivative"]


@pytest.mark.parametrize("case", ["gradient penalty", "accumulation", "left out"])
def test_other_ways_to_derive(results, case):
    assert all(result[case] < SAME for result in results)


def test_autocast(results):
    assert all(result["autocast"] == [0, True] for result in results)


def test_what_needs_no_other_process(results):
    for result in results:
        alone = result["alone"]
        assert alone["names"]
        assert alone["left"]
        assert alone["twice"]
        assert alone["clean"]
        assert alone["steps alive"] == 0
        for error in (alone["outer"], alone["inner"]):
            assert error.startswith("ValueError: shard: layers of the model are sharded already")


def test_errors_are_raised_in_every_process(results):
    expected = {
        "another model": "rank 0 and rank 1 have first_conv AOLConv2d 4, 4",
        "another method": "rank 0 and rank 1 have first_conv LOTConv2d",
        "fewer layers": "rank 0 and rank 1 have 5 and 8 lipfast layers",
        "input shapes": "differ in input shapes without the batch: ((3, 8, 8),) and ((3, 6, 6),)",
        "not finite": "expected finite values in LOTConv2d, got 144 NaN or Inf of 144",
        "not finite at first": "expected finite values in AOLConv2d, got 144 NaN or Inf of 144",
        "parameter hook": "register_post_accumulate_grad_hook, got register_hook",
    }
    for result in results:
        for case, text in expected.items():
            assert result["errors"][case].startswith("ValueError: "), case
            assert text in result["errors"][case]
        assert result["errors"]["in the model"] == "KeyError: 'in the model'"
        assert result["errors"]["left"]
        assert result["errors"]["nothing left"]
    builders = [result["errors"]["not finite"].startswith("ValueError: rank") for result in results]
    assert sorted(builders) == [False, True]  # the owner names the parameter, the other the owner


def test_four_processes(tmp_path):
    results = run_ranks(WORKER, 4, tmp_path, "more ranks")
    for rank, result in enumerate(results):
        found = result["more ranks"]
        assert found["layers"] % 4
        assert found["apart"] < SAME
        assert found["fewer layers than ranks"] < SAME
        if rank in (1, 3):
            assert found["a group of some"] < SAME
        else:
            assert "expected a group that this process is in" in found["a group of some"]
