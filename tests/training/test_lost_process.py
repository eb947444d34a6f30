"""A process that ends or hangs: the others stop with an error, and the checkpoint is whole."""

from pathlib import Path

import pytest
from processes import run_ranks

from lipfast.training import distributed_from_env, load_checkpoint

WORKER = Path(__file__).with_name("lost_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "limit"), [("ends sharded", 3), ("ends plain", 3), ("hangs sharded", 6)]
)
def test_a_lost_process(tmp_path, case, limit):
    how = case.split()[0]
    codes = [0, 3] if how == "ends" else [0, 0]
    results = run_ranks(WORKER, 2, tmp_path, case, codes=codes)
    found = results[0][case]
    assert found["error"].startswith("rank 0 of 2 waited for the others in vain")
    assert found["seconds"] < limit  # the group's time limit is 3 s
    assert found["step"] == 6
    if how == "hangs":
        assert results[1][case]["error"].startswith("rank 1 of 2 waited for the others in vain")
    folder = tmp_path / how
    assert [path.name for path in folder.iterdir()] == ["last.safetensors"]
    checkpoint = load_checkpoint(folder / "last.safetensors")
    assert checkpoint.metadata["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values())


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_positive(timeout):
    with (
        pytest.raises(ValueError, match="timeout must be a positive number of seconds"),
        distributed_from_env(timeout=timeout),
    ):
        pass
