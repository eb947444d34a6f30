"""The options of the benchmarks, and how they time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BENCH = """
import time
import pytest

def bench_verified(compare):
    runs = []
    seen = []
    def slow():
        runs.append(1)
        time.sleep(0.2)
        return 2
    compare({"fast": lambda: 1, "slow": slow}, rounds=5, seconds=0.1, verify=seen.append)
    assert seen == [{"fast": 1, "slow": 2}]
    assert len(runs) == 1

@pytest.mark.parametrize("network_size", ["L", "XS"])
def bench_network(compare, network_size):
    compare({"ours": lambda: 1, "theirs": lambda: 2}, rounds=3)

def bench_op(compare):
    compare({"ours": lambda: 1, "theirs": lambda: 2}, rounds=3)
"""


@pytest.fixture
def bench(tmp_path):
    """Runs benchmarks with the project's conftest; returns the process and the JSON's path."""
    names = "from conftest_of_bench import *\nfrom conftest_of_bench import pytest_addoption\n"
    source = (ROOT / "bench" / "conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest_of_bench.py").write_text(source)
    kept = "def pytest_generate_tests(metafunc): pass\n"  # the test has sizes of its own
    (tmp_path / "conftest.py").write_text(names + kept)
    (tmp_path / "bench_x.py").write_text(BENCH)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\npythonpath = .\n"
    )
    results = tmp_path / "bench.json"

    def run(*options: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
        command += ["--benchmark-only", f"--benchmark-json={results}", *options]
        # or pytest-benchmark takes the process for one of pytest-xdist's, and measures nothing
        alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        found = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env=alone
        )
        return found, results

    return run


def names(path: Path) -> list[str]:
    return [entry["name"] for entry in json.loads(path.read_text())["benchmarks"]]


def test_a_budget_takes_ops_first_and_large_networks_last(bench):
    process, results = bench("--budget=100")
    assert process.returncode == 0, process.stdout + process.stderr
    expected = ["bench_verified", "bench_op", "bench_network[XS]", "bench_network[L]"]
    assert names(results) == expected
    document = json.loads(results.read_text())
    assert document["benchmarks"][0]["extra_info"]["ratio"]["slow"] > 1
    assert "how many times as long" in process.stdout


def test_what_does_not_fit_into_the_budget_is_skipped(bench):
    process, _ = bench("--budget=0")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "4 skipped" in process.stdout
    assert "the budget of 0 seconds is used up" in process.stdout
