"""Networks under fully_shard (FSDP2), two gloo processes, against one process."""

from pathlib import Path

import pytest
from processes import run_ranks

from lipfast.nn import METHODS

WORKER = Path(__file__).with_name("fsdp_worker.py")
SAME = 1e-9

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    ranks = run_ranks(WORKER, 2, tmp_path_factory.mktemp("fsdp"), "every method")
    return [rank["every method"] for rank in ranks]


@pytest.mark.parametrize("method", METHODS)
def test_training_is_that_of_one_process(results, method):
    for result in results:
        assert result[method]["names"]
        assert result[method]["state"] < SAME
        assert result[method]["outputs"] < SAME


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_evaluation_follow_the_parameters(results, method):
    for result in results:
        assert result[method]["after a step"] < SAME
        assert result[method]["after loading"] < SAME
        # the whole parameters' versions and addresses may stay as they were
        assert result[method]["counted"] == [False, True]


@pytest.mark.parametrize("method", METHODS)
def test_bounds_need_whole_parameters(results, method):
    for result in results:
        assert result[method]["bound"].startswith("ValueError: weight: expected a whole tensor")
        assert result[method]["bound of the whole"] < SAME
        assert "has DTensor parameters, as FSDP makes them" in result[method]["shard"]
