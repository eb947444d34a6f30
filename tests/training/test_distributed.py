"""Two gloo processes, started by torchrun, against one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lipfast.training import World, distributed_from_env, load_checkpoint

WORKER = Path(__file__).with_name("ddp_worker.py")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def launch(processes, folder, *arguments):
    repository = Path(__file__).parents[2]
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(WORKER), str(folder), *arguments]
    return subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    outcome = {}
    for processes in (1, 2):
        done = launch(processes, folder / str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        outcome[processes] = folder / str(processes)
    return outcome


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


@pytest.mark.parametrize("case", ["uneven", "tail-of-one", "cpl", "soc", "sharded"])
def test_two_processes_equal_one(runs, case):
    (single,) = results(runs[1])
    first, second = results(runs[2])
    assert first[case]["losses"] == second[case]["losses"]
    # Only the order of float32 sums differs.
    assert first[case]["losses"] == pytest.approx(single[case]["losses"], rel=1e-4, abs=1e-6)
    one = load_checkpoint(runs[1] / case / "last.safetensors")
    two = load_checkpoint(runs[2] / case / "last.safetensors")
    assert one.model.keys() == two.model.keys()
    for name, tensor in one.model.items():
        torch.testing.assert_close(two.model[name], tensor, rtol=1e-4, atol=2e-5)
    assert one.metadata["model"] == two.metadata["model"]
    # Both ranks end with the same bits.
    assert first[case]["weights"] == second[case]["weights"]


def test_only_rank_zero_reports(runs):
    first, second = results(runs[2])
    assert first["uneven"]["epochs_seen"] == [1, 2, 3]
    assert second["uneven"]["epochs_seen"] == []


def test_resume_with_two_processes(runs):
    first, second = results(runs[2])
    assert first["resumed"]["losses"] == first["uneven"]["losses"]
    assert first["resumed"]["weights"] == second["resumed"]["weights"] == first["uneven"]["weights"]


def test_divergence_on_one_rank_stops_both(tmp_path):
    done = launch(2, tmp_path, "diverge")
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [result["diverged"] for result in results(tmp_path)]
    assert messages[0] == messages[1]
    assert "the loss is nan in epoch 2, step 1" in messages[0]


def test_without_torchrun_there_is_one_process():
    with distributed_from_env("cuda") as world:
        assert world == World(0, 1, "cuda")
    assert not torch.distributed.is_initialized()


def test_incomplete_environment(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="missing LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        distributed_from_env(),
    ):
        pass


def test_bad_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    with (
        pytest.raises(ValueError, match='device must be "cpu" or "cuda"'),
        distributed_from_env("meta"),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    wrong = "WORLD_SIZE must be a number, got 'two'"
    with pytest.raises(ValueError, match=wrong), distributed_from_env():
        pass
